"""Which positions count is observed by one rank and holds for all: two ranks count what one does."""

from __future__ import annotations

import subprocess

import pytest
import torch

from gptq_plugin.calibration import verdicts

from forked_python import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")]

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from gptq_plugin import QuantizeModule

out = Path(sys.argv[1])
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}

def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0
    ))

def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))

def sources_and_targets():
    # Padded to one length, 40 and 120 of 160 positions each
    kept = torch.arange(40) < torch.tensor([10, 20, 5, 5])[:, None]
    ids = torch.randint(4, 64, (4, 40))
    labels = torch.where(torch.arange(40) < torch.tensor([30, 30, 20, 40])[:, None], ids.roll(1), -100)
    return {"input_ids": ids, "attention_mask": kept.long(), "labels": labels}

def flattened():
    texts = [torch.randint(4, 64, (length,)).tolist() for length in (7, 13, 30, 20)]
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt")
    return collate([{"input_ids": text, "labels": text} for text in texts])

def padded(kept):
    ids = torch.randint(4, 64, (4, 20))
    return {"input_ids": ids, "attention_mask": (torch.arange(20) < torch.tensor(kept)[:, None]).long()}

def one_rank_pads():
    # Every second batch is padded: of two ranks one sees no padding
    padded.calls = getattr(padded, "calls", 0) + 1
    return padded([10, 20, 5, 5] if padded.calls % 2 else [20] * 4)

SCENES = {"t5": (t5, sources_and_targets), "flattened": (llama, flattened), "one": (llama, one_rank_pads)}

def work(rank, ranks):
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", f"file://{out}/store{ranks}", rank=rank, world_size=ranks)
    for name, (model, batch) in SCENES.items():
        torch.manual_seed(0)
        network, batches = model().eval(), [batch() for _ in range(4)]
        quantizer = QuantizeModule(group_size=32, nsamples=80, clip_ratios=(1.0,))
        report = quantizer.quantize(network, batches[rank::ranks])
        tokens = {module.name: module.tokens for module in report.quantized}
        torch.save((tokens, report.positions, network.state_dict()), out / f"{name}{ranks}{rank}.pt")

for ranks in (1, 2):
    mp.start_processes(work, (ranks,), nprocs=ranks, start_method="fork")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By scene, what one rank found, and what each of two did: tokens by layer, positions, state."""
    out = tmp_path_factory.mktemp("positions")
    (out / "run.py").write_text(SCRIPT)
    subprocess.run([python(), out / "run.py", out], check=True, timeout=300)
    return lambda scene: [torch.load(out / f"{scene}{who}.pt") for who in ("10", "20", "21")]


def same_on_all(runs):
    (tokens, positions, state), *others = runs
    for theirs in others:
        assert theirs[:2] == (tokens, positions)
        assert all(torch.equal(state[name], value) for name, value in theirs[2].items())
    return tokens, positions


def test_sides_of_an_encoder_decoder_padded_to_one_length_are_told_apart_on_two_ranks(found):
    tokens, positions = same_on_all(found("t5"))
    sources = {n for n in tokens if "decoder." not in n or ".EncDecAttention.k" in n or ".EncDecAttention.v" in n}
    assert {tokens[name] for name in sources} == {160} and {tokens[name] for name in {*tokens} - sources} == {480}
    assert len(positions) == 2 and set(positions.values()) == {verdicts.OBSERVED}


def test_flattened_texts_count_whole_on_two_ranks(found):
    tokens, positions = same_on_all(found("flattened"))
    assert set(tokens.values()) == {280} and positions == {}


def test_a_rank_without_padding_takes_what_the_other_one_observed(found):
    tokens, positions = same_on_all(found("one"))
    assert set(tokens.values()) == {2 * 40 + 2 * 80} and positions == {"`attention_mask`": verdicts.OBSERVED}
