"""The sequences that a call's arguments describe."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from gptq_plugin.calibration.sequences import TARGETS, arguments_of, masks_among, sequences_in, writes_targets

from models import tiny_llama

KEPT = torch.arange(6) < torch.tensor([[4], [6], [2]])
X, Y, IDS = torch.randn(3, 6, 8), torch.randn(3, 5, 8), torch.ones(3, 6, dtype=torch.long)


class Own(nn.Module):
    def forward(self, *args, **kwargs):
        return None


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
    )


def found(module, inverted=(), **arguments):
    return sequences_in(module, arguments_of(arguments), inverted)


@pytest.mark.parametrize(
    ("module", "name", "hides", "documented"),
    [
        (tiny_llama(), "attention_mask", False, True),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1), "src_key_padding_mask", True, True),
        (nn.MultiheadAttention(8, 2), "key_padding_mask", True, True),
        (nn.Sequential(), "attention_mask", False, False),  # no argument of its forward
        (Own(), "mask", False, False),
        (Own(), "attention_mask", False, False),
        (Own(), "padding_mask", True, False),
        (Own(), "src_key_padding_mask", True, False),
    ],
)
def test_the_sense_of_ones_is_documented_or_that_of_the_name(module, name, hides, documented):
    contents = {"input_ids": IDS} if isinstance(module, transformers.PreTrainedModel) else {"src": X, "key": X}
    for inverted in ((), (name,)):
        (one,) = found(module, inverted, **contents, **{name: ~KEPT if hides else KEPT}).values()
        assert torch.equal(one.kept, ~KEPT if inverted else KEPT) and one.is_documented is documented
    (one,) = found(module, **contents, **{name: torch.where(KEPT, 0.0, -1e9)}).values()
    assert torch.equal(one.kept, KEPT) and one.is_documented


def test_pytorchs_masks_of_pairs_are_of_no_samples_even_where_they_are_as_many():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1)
    x, causal = torch.randn(6, 6, 8), torch.ones(6, 6).tril() == 0
    (one,) = found(module, src=x, mask=causal).values()
    assert one.kept.shape == (6, 6) and one.kept.all()


def test_masks_are_of_the_arguments_with_their_prefix():
    kept = KEPT[:, :5]
    seen = found(Own(), src=X, tgt=Y, src_mask=KEPT, tgt_mask=kept, memory_mask=KEPT)
    assert {name: [id(content) for content in one.contents] for name, one in seen.items()} == {
        "src_mask": [id(X)],
        "tgt_mask": [id(Y)],
        "memory_mask": [id(X)],
    }
    (one,) = found(Own(), tokens=IDS, x_mask=KEPT).values()
    assert one.contents[0] is IDS


def test_arguments_are_found_at_any_depth_and_lengths_are_masks():
    batch = {"batch": {"x": X, "lengths": torch.tensor([4, 6, 2])}, "cu_seqlens": torch.tensor([0, 4, 10, 12])}
    assert set(masks_among(arguments_of(batch))) == {"lengths"}
    (one,) = sequences_in(Own(), arguments_of(batch)).values()
    assert torch.equal(one.kept, KEPT)


@pytest.mark.parametrize("name", ["head_mask", "bool_masked_pos", "loss_mask", "image_mask", "mask_token", "x"])
def test_other_masks_hide_no_padding(name):
    assert found(Own(), x=X, **({name: KEPT} if name != "x" else {})) == {}


def test_a_mask_without_anything_of_its_sizes_is_of_nothing():
    assert found(Own(), pixel_values=torch.randn(3, 2, 7, 7), attention_mask=KEPT) == {}


def test_one_text_without_samples():
    (one,) = found(Own(), x=torch.randn(6, 8), mask=KEPT[0]).values()
    assert torch.equal(one.kept, KEPT[:1])


LABELS = torch.tensor([[1, 2, -100, 3, -100], [-100] * 5, [4, 5, 6, 7, 8]])
TAIL = torch.tensor([[1, 1, 1, 1, 0], [0] * 5, [1] * 5]).bool()


def test_an_encoder_decoders_targets_end_with_their_last_label():
    model = t5()
    seen = found(model, input_ids=IDS, attention_mask=KEPT.long(), labels=LABELS)
    assert list(seen) == ["attention_mask", TARGETS] and torch.equal(seen[TARGETS].kept, TAIL)
    assert seen[TARGETS].is_labels and seen["attention_mask"].contents[0] is IDS
    ids = LABELS.clamp(min=0)
    seen = found(model, input_ids=IDS, decoder_input_ids=ids, labels=LABELS)
    assert torch.equal(seen[TARGETS].kept, TAIL) and not seen[TARGETS].is_labels and seen["input_ids"].kept.all()
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 3)
    seen = found(model, input_ids=IDS, decoder_input_ids=ids, labels=LABELS, decoder_attention_mask=mask)
    assert torch.equal(seen[TARGETS].kept, mask.bool()) and set(seen) == {"input_ids", TARGETS}
    assert found(model, input_ids=IDS, decoder_input_ids=ids)[TARGETS].kept.all()


def test_labels_are_no_targets_elsewhere():
    assert not writes_targets(tiny_llama()) and not writes_targets(t5().encoder) and writes_targets(t5())
    assert list(found(tiny_llama(), input_ids=IDS, attention_mask=KEPT.long(), labels=IDS)) == ["attention_mask"]
