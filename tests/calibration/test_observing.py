"""Which rows of each layer's input count, in real models: a padded position is one that does not matter."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gptq_plugin import QuantizeModule
from gptq_plugin.calibration import verdicts

from models import tiny_llava

SMALL = {"group_size": 32, "nsamples": 80, "clip_ratios": (1.0,)}
BATCHES, SAMPLES, LENGTH = 4, 4, 20
SOURCE = [10, 20, 5, 5]  # 40 of 80 positions
TARGET = [20, 10, 20, 20]  # 70
KEPT = torch.arange(LENGTH) < torch.tensor(SOURCE)[:, None]
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()
LONG = (torch.arange(150) < torch.tensor([[100], [150], [50], [50]])).long()
LOWEST = torch.finfo(torch.float32).min
TRANSFORMER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
               "vocab_size": 64}  # fmt: skip
BART = {"vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "d_model": 64,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2, "vocab_size": 64,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


def made(kind, *args, **kwargs):
    torch.manual_seed(0)
    return kind(*args, **kwargs).eval()


def ids(samples=SAMPLES, length=LENGTH):
    return torch.randint(4, 64, (samples, length))


def quantized(model, batch, forward=None, batches=BATCHES):
    """The report, and by number of tokens the layers."""
    report = QuantizeModule(**SMALL).quantize(model, [batch() for _ in range(batches)], forward=forward)
    layers = defaultdict(set)
    for module in report.quantized:
        layers[module.tokens].add(module.name)
    return report, dict(layers)


def labels(lengths=TARGET, length=LENGTH):
    return torch.where(torch.arange(length) < torch.tensor(lengths)[:, None], ids(length=length), -100)


# --- encoder-decoders ---


def t5():
    return made(transformers.T5ForConditionalGeneration, transformers.T5Config(**T5))


def bart():
    return made(transformers.BartForConditionalGeneration, transformers.BartConfig(**BART))


def is_of_source(name):
    return "decoder." not in name or ".EncDecAttention.k" in name or ".EncDecAttention.v" in name


@pytest.mark.parametrize("with_decoder_ids", [False, True])
def test_t5s_sides_are_told_apart_where_sources_and_targets_are_padded_to_one_length(with_decoder_ids):
    model = t5()

    def batch():
        one = {"input_ids": ids(), "attention_mask": KEPT.long(), "labels": labels([30, 30, 20, 40], 40)}
        one["input_ids"] = torch.cat([one["input_ids"]] * 2, 1)
        one["attention_mask"] = torch.cat([one["attention_mask"], torch.zeros_like(one["attention_mask"])], 1)
        if with_decoder_ids:  # as DataCollatorForSeq2Seq gives them to a Seq2SeqTrainer
            one["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(one["labels"])
        return one

    report, layers = quantized(model, batch)
    assert set(layers) == {160, 480}
    assert layers[160] == {module.name for module in report.quantized if is_of_source(module.name)}
    assert set(report.positions.values()) == {verdicts.OBSERVED} and len(report.positions) == 2


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("device", "streamed"),
    [("cpu", True), *(pytest.param("cuda", streamed, marks=ON_GPU) for streamed in (True, False))],
)
def test_sides_are_told_apart_where_weights_are_streamed_and_batches_run_on_a_gpu(device, streamed):
    def batch():
        ids = torch.randint(4, 64, (4, 40))
        mask = (torch.arange(40) < torch.tensor(SOURCE)[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels([30, 30, 20, 40], 40)}

    model = t5()
    quantizer = QuantizeModule(**SMALL, offload_weights=streamed or None, offload_activations=streamed or None)
    report = quantizer.quantize(model, [batch() for _ in range(BATCHES)], device=device)
    assert {module.tokens for module in report.quantized if is_of_source(module.name)} == {160}
    assert {module.tokens for module in report.quantized if not is_of_source(module.name)} == {480}
    assert set(report.positions.values()) == {verdicts.OBSERVED} and len(report.positions) == 2
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("with_mask", [False, True])
def test_targets_are_cut_behind_their_last_label_where_no_source_is_padded(with_mask):
    def batch():
        mask = {"attention_mask": torch.ones(4, 20, dtype=torch.long)} if with_mask else {}
        return {"input_ids": ids(), "labels": labels([10, 20, 5, 5], 40), **mask}

    _, layers = quantized(t5(), batch)
    assert set(layers) == {320, 160} and all(map(is_of_source, layers[320])) and len(layers[320]) == 16


def test_a_full_source_and_padded_targets_of_its_length():
    _, layers = quantized(t5(), lambda: {"input_ids": ids(), "labels": labels(SOURCE)})
    assert set(layers) == {320, 160} and all(map(is_of_source, layers[320])) and len(layers[320]) == 16


def test_labels_left_out_within_a_target_still_matter():
    def batch():
        given = labels([20, 10, 20, 20])
        given[:, 3:6] = -100  # what comes behind reads these positions
        return {"input_ids": ids(), "attention_mask": KEPT.long(), "labels": given}

    assert set(quantized(bart(), batch)[1]) == {160, 280}


def test_a_decoders_mask_comes_before_its_labels():
    def batch():
        mask = (torch.arange(20) < torch.tensor([[20], [15], [20], [20]])).long()
        return {"input_ids": ids(), "attention_mask": KEPT.long(), "labels": labels(), "decoder_attention_mask": mask}

    assert set(quantized(bart(), batch)[1]) == {160, 300}


@pytest.mark.parametrize("masked", [False, True])
def test_whispers_encoder_reads_all_frames_and_its_decoder_up_to_the_last_label(masked):
    """Forty frames become twenty positions. The encoder does not use a mask: what it hides matters."""
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[0, 20:] = mask[1, 30:] = 0

    def batch():
        one = {"input_features": torch.randn(4, 8, 40), "labels": labels([15, 15, 20, 10], 40)}
        return {**one, "attention_mask": mask} if masked else one

    model = made(transformers.WhisperForConditionalGeneration, transformers.WhisperConfig(**WHISPER))
    report, layers = quantized(model, batch)
    assert set(layers) == {240, 320}
    assert all(".decoder." in name for name in layers[240])
    ignored = [text for text in report.deviations if "as if there were no mask" in text]
    assert len(ignored) == masked and report.positions.get("`attention_mask`") == (verdicts.MATTERS if masked else None)


# --- masks of other shapes ---


def llama():
    return made(transformers.LlamaForCausalLM, transformers.LlamaConfig(num_key_value_heads=1, **TRANSFORMER))


ALLOWED = CAUSAL & KEPT[:, None, None]
TO_LEFT = CAUSAL & KEPT.flip(1)[:, None, None]
MASKS = {
    "right": KEPT.long(),
    "left": KEPT.flip(1).long(),
    "booleans of pairs": ALLOWED,
    "floats of pairs": torch.where(ALLOWED, 0.0, LOWEST),
    "infinite": torch.where(ALLOWED, 0.0, -torch.inf),
    "padding attends to all": ALLOWED | ~ALLOWED.any(-1, keepdim=True),
    "padding to the left attends to all": TO_LEFT | ~TO_LEFT.any(-1, keepdim=True),
    "a window": ALLOWED & ~CAUSAL.tril(-6),
}


@pytest.mark.parametrize("mask", list(MASKS))
def test_padding_is_left_out_whatever_the_mask_looks_like(mask):
    report, layers = quantized(llama(), lambda: {"input_ids": ids(), "attention_mask": MASKS[mask]})
    assert set(layers) == {160} and len(layers[160]) == 14
    assert report.positions == {"`attention_mask`": verdicts.OBSERVED} and not report.deviations[1:]


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.ones(4, 20, dtype=torch.long),
        CAUSAL.expand(4, 1, 20, 20),
        (CAUSAL & (torch.arange(20) // 7 == (torch.arange(20) // 7)[:, None])).expand(4, 1, 20, 20),  # three documents
    ],
)
def test_all_positions_count_where_none_is_padding(mask):
    given = {} if mask is None else {"attention_mask": mask}
    report, layers = quantized(llama(), lambda: {"input_ids": ids(), **given})
    assert set(layers) == {320} and report.positions == {}


def test_prompts_without_labels_count_in_a_causal_model():
    def batch():
        given = ids()
        return {"input_ids": given, "labels": torch.where(torch.arange(20) < 8, -100, given)}

    assert set(quantized(llama(), batch)[1]) == {320}


def test_packed_texts_without_a_mask_count_whole():
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    report, layers = quantized(llama(), lambda: {"input_ids": ids(1), "position_ids": positions}, batches=16)
    assert set(layers) == {320} and report.positions == {}


# --- rows of several texts ---

TEXTS = (7, 13, 30, 20)  # tokens; 280 in four batches


def texts(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 64, (length,), generator=g).tolist() for length in TEXTS]


def flattened(seed, **options):
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate([{"input_ids": text, "labels": text} for text in texts(seed)])


def quantized_weights(data, **options):
    model = llama()
    report = QuantizeModule(**SMALL | options).quantize(model, data)
    (tokens,) = {module.tokens for module in report.quantized}
    return tokens, report.positions, {k: v for k, v in model.state_dict().items() if k.endswith("qweight")}


@pytest.mark.parametrize("for_flash", [False, True])
def test_flattened_texts_count_and_weigh_as_by_themselves(for_flash):
    extra = {"return_flash_attn_kwargs": True, "return_seq_idx": True} if for_flash else {}
    *apart, codes = quantized_weights([text for seed in range(4) for text in texts(seed)])
    *together, theirs = quantized_weights([flattened(seed, **extra) for seed in range(4)])
    assert apart == together == [280, {}]
    assert all((codes[name] == theirs[name]).float().mean() > 0.99 for name in codes)
    positions = [{**flattened(seed), "position_ids": torch.arange(70)[None]} for seed in range(4)]  # one long text
    assert any((codes[n] == v).float().mean() < 0.95 for n, v in quantized_weights(positions)[2].items())


def test_the_last_token_of_a_flattened_text_does_not_predict_the_next_ones_first():
    tokens, *_ = quantized_weights([flattened(seed) for seed in range(4)], token_weighting="labels")
    assert tokens == 280 - 4 * len(TEXTS)


@pytest.mark.parametrize("numbered", [True, False])
def test_padding_behind_flattened_texts_is_left_out_by_a_mask_that_numbers_them_or_not(numbered):
    numbers = [torch.full((length,), n if numbered else 1) for n, length in enumerate(TEXTS, 1)]
    mask = torch.cat([*numbers, torch.zeros(10, dtype=torch.long)])[None]
    batches = [
        {
            "input_ids": torch.cat([one["input_ids"], ids(1, 10)], 1),
            "position_ids": torch.cat([one["position_ids"], torch.arange(10)[None]], 1),
            "attention_mask": mask,
        }
        for one in map(flattened, range(4))
    ]
    tokens, positions, _ = quantized_weights(batches)
    assert (tokens, positions) == (280, {"`attention_mask`": verdicts.OBSERVED})


def test_boundaries_of_ragged_texts_are_no_mask():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, cu_seqlens):
            ends = cu_seqlens.tolist()
            parts = [self.mix(x[a:b]).mean(0).expand(b - a, -1) for a, b in pairwise(ends)]
            return self.out(torch.cat(parts) + x)

    def batch():
        return {"x": torch.randn(70, 64), "cu_seqlens": torch.tensor([0, *torch.tensor(TEXTS).cumsum(0)])}

    report, layers = quantized(made(Ragged), batch, batches=2)
    assert layers == {140: {"mix", "out"}} and report.positions == {}
    assert not any("mask" in one for one in report.all_deviations())


def test_berts_pooled_vector_is_one_row_a_sample():
    def batch():
        kinds = torch.zeros(4, 20, dtype=torch.long)
        return {"input_ids": ids(), "attention_mask": KEPT.long(), "token_type_ids": kinds}

    report, layers = quantized(made(transformers.BertModel, transformers.BertConfig(**TRANSFORMER)), batch)
    assert layers.pop(16) == {"pooler.dense"} and set(layers) == {160}
    assert report.positions == {"`attention_mask`": verdicts.OBSERVED}


def test_ids_are_left_alone_where_a_model_counts_positions_by_them():
    """RoBERTa's position ids begin behind padding: other ids there would move every position."""

    def batch():
        given = ids()
        given[~KEPT.flip(1)] = 1
        return {"input_ids": given, "attention_mask": KEPT.flip(1).long()}

    config = transformers.RobertaConfig(pad_token_id=1, **TRANSFORMER)
    model = made(transformers.RobertaModel, config, add_pooling_layer=False)
    report, layers = quantized(model, batch)
    assert set(layers) == {160} and report.positions == {"`attention_mask`": verdicts.OBSERVED}


def test_images_among_the_tokens_count_and_padding_does_not():
    model = tiny_llava()

    def batch():
        given = ids()
        given[:, 0:4] = 120
        return {"input_ids": given, "attention_mask": KEPT.long(), "pixel_values": torch.randn(4, 3, 28, 28)}

    report, layers = quantized(model, batch)
    assert set(layers) == {160} and report.positions == {"`attention_mask`": verdicts.OBSERVED}


def test_sequences_before_samples_are_told_by_what_answers_where_sizes_do_not():
    """XLNet has [positions, samples, width], here twenty of both."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=64, n_layer=1, n_head=2, d_inner=96)
    mask = KEPT.flip(1).long().repeat(5, 1)
    mask[0] = 1
    report, layers = quantized(
        made(transformers.XLNetModel, config), lambda: {"input_ids": ids(20), "attention_mask": mask}, batches=1
    )
    assert set(layers) == {int(mask.sum())} and report.positions == {"`attention_mask`": verdicts.OBSERVED}


def test_rows_that_a_model_sets_to_zero_are_padding_too():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, state_size=4)
    _, layers = quantized(
        made(transformers.MambaForCausalLM, config), lambda: {"input_ids": ids(), "attention_mask": KEPT.long()}
    )
    assert set(layers) == {160}


# --- modules of PyTorch, and the user's own ---


class Encoder(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.batch_first = batch_first

    def forward(self, tokens, padding_mask):
        x = self.embed(tokens)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.encoder(x, src_key_padding_mask=padding_mask)


LINEARS = {f"layers.{layer}.linear{number}" for layer in (0, 1) for number in (1, 2)}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("samples", [4, 20])
def test_an_encoder_of_pytorch_is_calibrated_without_its_padding(batch_first, samples):
    mask = ~KEPT.repeat(samples // 4, 1)
    report, layers = quantized(
        made(Encoder, batch_first), lambda: {"tokens": ids(samples), "padding_mask": mask}, batches=80 // samples
    )
    assert layers == {800: {f"encoder.{name}" for name in LINEARS}}
    assert report.positions["`padding_mask`"] == verdicts.OBSERVED


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_key_padding_masks_hide_where_they_are_true_or_very_negative(additive, causal):
    mask = torch.where(KEPT, 0.0, -torch.inf) if additive else ~KEPT
    also = {"mask": torch.where(CAUSAL, 0.0, -torch.inf) if additive else ~CAUSAL} if causal else {}
    model = made(nn.TransformerEncoder, nn.TransformerEncoderLayer(64, 2, 96, batch_first=True), 2)
    _, layers = quantized(model, lambda: (torch.randn(4, 20, 64), mask),
                          lambda model, batch: model(batch[0], src_key_padding_mask=batch[1], **also))  # fmt: skip
    assert layers == {160: LINEARS}


def test_a_transformer_of_pytorch_has_a_mask_for_each_sequence():
    model = made(nn.Transformer, 64, 2, 1, 1, 96, batch_first=True)
    kept = torch.arange(20) < torch.tensor(TARGET)[:, None]

    def batch():
        one = {"src": torch.randn(4, 20, 64), "tgt": torch.randn(4, 20, 64), "tgt_mask": ~CAUSAL}
        return {**one, "src_key_padding_mask": ~KEPT, "tgt_key_padding_mask": ~kept, "memory_key_padding_mask": ~KEPT}

    _, layers = quantized(model, batch)
    assert layers == {
        160: {"encoder.layers.0.linear1", "encoder.layers.0.linear2"},
        280: {"decoder.layers.0.linear1", "decoder.layers.0.linear2"},
    }


class Attention(nn.Module):
    """Takes its mask as `how` tells."""

    def __init__(self, how="keeps"):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.how = how

    def forward(self, x, mask):
        keeps = {"keeps": lambda: mask.bool(), "ignores": lambda: ~mask.bool(), "adds": lambda: mask}[self.how]()
        keeps = keeps.reshape(len(x), 1, -1) if keeps.dim() != 4 else keeps[:, 0]
        return self.o(scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=keeps))


HIDES = torch.where(KEPT, 0.0, -1e9)


@pytest.mark.parametrize(
    ("how", "mask"),
    [
        ("keeps", KEPT),
        ("keeps", KEPT.float()),
        ("keeps", KEPT.long()[:, None]),
        ("ignores", ~KEPT),
        ("ignores", (~KEPT).long()),
        ("adds", HIDES),
        ("adds", HIDES[:, None, None]),
        ("adds", HIDES[:, None, None].expand(4, 1, 20, 20)),
    ],
)
def test_what_a_mask_of_the_users_own_means_is_observed(how, mask):
    report, layers = quantized(made(Attention, how), lambda: {"x": torch.randn(4, 20, 64), "mask": mask})
    assert set(layers) == {160}
    assert report.positions == {"`mask`": verdicts.OBSERVED} and not report.deviations[1:]


def test_lengths_are_a_mask():
    class Lengths(Attention):
        def forward(self, x, lengths):
            return super().forward(x, torch.arange(x.shape[1]) < lengths[:, None])

    given = {"lengths": torch.tensor(SOURCE)}
    report, layers = quantized(made(Lengths), lambda: {"x": torch.randn(4, 20, 64), **given})
    assert set(layers) == {160} and report.positions == {"`lengths`": verdicts.OBSERVED}


@pytest.mark.parametrize("hides", [False, True])
def test_a_mask_of_a_module_that_mixes_no_positions_is_known_by_what_it_pools(hides):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x, mask):
            counts = (~mask if hides else mask)[..., None]
            return self.b((self.a(x) * counts).sum(1) / counts.sum(1))

    _, layers = quantized(made(Pooled), lambda: {"x": torch.randn(4, 20, 64), "mask": ~KEPT if hides else KEPT})
    assert layers == {160: {"a"}, 16: {"b"}}


def test_where_nothing_shows_what_a_mask_means_its_name_tells_and_that_is_reported():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x, mask):
            return self.a(x)

    report, layers = quantized(made(Apart), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert layers == {160: {"a"}} and report.positions == {"`mask`": verdicts.BY_NAME}
    assert [text for text in report.deviations if verdicts.BY_NAME in text]


def test_a_mask_that_a_module_does_not_use_hides_nothing():
    class Unused(Attention):
        def forward(self, x, mask):
            return super().forward(x, torch.ones_like(mask))

    report, layers = quantized(made(Unused), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert set(layers) == {320} and report.positions == {"`mask`": verdicts.MATTERS}
    assert [text for text in report.deviations if "all positions count" in text]


class Noisy(Attention):
    def forward(self, x, mask):
        return super().forward(x + torch.randn_like(x), mask)


class Normed(Attention):
    """Samples of a batch change one another."""

    def forward(self, x, mask):
        return super().forward((x - x.mean((0, 1))) / x.std((0, 1)), mask)


@pytest.mark.parametrize(("kind", "verdict"), [(Noisy, verdicts.UNREPEATABLE), (Normed, verdicts.CROSSES)])
def test_where_nothing_can_be_observed_the_mask_is_read_as_declared_and_that_is_reported(kind, verdict):
    report, layers = quantized(made(kind), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert set(layers) == {160} and report.positions == {"`mask`": verdict}
    assert [text for text in report.deviations if verdict in text]


def test_observing_leaves_random_numbers_as_they_were():
    def drawn(mask):
        torch.manual_seed(1)
        quantized(made(Noisy), lambda: {"x": torch.zeros(4, 20, 64), "mask": mask})
        return torch.rand(3)

    assert torch.equal(drawn(KEPT), drawn(torch.ones_like(KEPT)))


def test_latent_queries_as_many_as_there_are_positions_all_count():
    class Latents(Attention):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(20, 64))

        def forward(self, x, mask):
            queries = self.q(self.latents.expand(len(x), -1, -1))
            return self.o(scaled_dot_product_attention(queries, self.k(x), self.v(x), attn_mask=mask[:, None]))

    _, layers = quantized(made(Latents), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert layers == {160: {"k", "v"}, 320: {"q", "o"}}


def test_rows_shortened_by_a_convolution_count_where_they_are_over_a_position_that_does():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Linear(64, 64)

        def forward(self, x, mask):
            return self.a(self.conv(x.transpose(1, 2)).transpose(1, 2))

    _, layers = quantized(made(Short), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert layers == {4 * (5 + 10 + 3 + 3): {"a"}}


def test_rows_flattened_with_positions_first_are_told_by_what_answers():
    class Flat(Attention):
        def forward(self, x, mask):
            flat = x.transpose(0, 1).reshape(-1, 64)  # [positions x samples, width]
            q, k, v = (layer(flat).reshape(20, -1, 64).transpose(0, 1) for layer in (self.q, self.k, self.v))
            return self.o(scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]))

    x = torch.randn(4, 20, 64)
    x[~KEPT] = 1e3  # would stand out in a Hessian
    model = made(Flat)
    report = QuantizeModule(**SMALL).quantize(model, [{"x": x, "mask": KEPT}] * 4)
    assert {module.tokens for module in report.quantized} == {160}
    first = report.quantized[0]
    assert first.loss < 1 and first.max_input == 1e3  # the range is of every row


def test_padding_among_rows_in_no_known_layout_is_counted_and_reported():
    class Rolled(Attention):
        def forward(self, x, mask):
            super().forward(x, mask)
            return self.o(x.roll(7, 1)[:, 1:])

    report, layers = quantized(made(Rolled), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert layers == {160: {"q", "k", "v"}, 160 + 4 * 76: {"o"}}
    (module,) = (module for module in report.quantized if module.name == "o")
    assert "do not describe: all its positions counted (4 batches)" in " ".join(module.deviations)


def test_the_first_blocks_show_what_holds_for_all():
    calls, config = [], transformers.LlamaConfig(**{**TRANSFORMER, "num_hidden_layers": 5})
    model = made(transformers.LlamaForCausalLM, config)
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    _, layers = quantized(model, lambda: {"input_ids": ids(4, 150), "attention_mask": LONG})
    assert set(layers) == {4 * (100 + 150 + 50 + 50)} and len(layers[1400]) == 35
    assert calls.count(50 + 64) <= 3 * 2  # positions around the edge: three variants, two blocks


def test_a_layer_that_both_sides_share_is_observed_at_every_call():
    class Shared(nn.Module):
        """One layer for a source and for as long a target."""

        def __init__(self):
            super().__init__()
            self.both, self.o = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, src, tgt, src_key_padding_mask, tgt_key_padding_mask):
            hides = src_key_padding_mask[:, None]
            source, target = self.o(self.both(src)), self.both(tgt)
            return self.o(scaled_dot_product_attention(target, source, source, attn_mask=hides))

    kept = torch.arange(20) < torch.tensor(TARGET)[:, None]
    masks = {f"{name}_key_padding_mask": torch.where(one, 0.0, -1e9) for name, one in (("src", KEPT), ("tgt", kept))}
    _, layers = quantized(made(Shared), lambda: {"src": torch.randn(4, 20, 64), "tgt": torch.randn(4, 20, 64), **masks})
    assert layers == {160 + 280: {"both", "o"}}


def test_a_forward_that_takes_no_fewer_samples_is_observed_with_all():
    class Whole(Attention):
        def forward(self, x, mask):
            assert len(x) == 4
            return super().forward(x, mask)

    report, layers = quantized(made(Whole), lambda: {"x": torch.randn(4, 20, 64), "mask": KEPT})
    assert set(layers) == {160} and report.positions == {"`mask`": verdicts.OBSERVED}


def test_a_forward_that_takes_no_other_values_is_read_as_declared_and_that_is_reported():
    given = torch.randn(4, 20, 64)

    class Same(Attention):
        def forward(self, x, mask):
            if not torch.equal(x, given):
                raise ValueError("other values")
            return super().forward(x, mask)

    report, layers = quantized(made(Same), lambda: {"x": given, "mask": KEPT})
    assert set(layers) == {160}
    (verdict,) = report.positions.values()
    assert verdict.startswith(verdicts.FAILED) and "ValueError: other values" in verdict
    assert any(verdict in text for text in report.deviations)
