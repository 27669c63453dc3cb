"""Compares the methods of quantization, and the parts of `best`, on trained models: loss, divergence, seconds.

    python scripts/bench_methods.py parts       # pycode-29m: `best` built up part by part, and with one part changed
    python scripts/bench_methods.py settings    # calibration rows of three seeds, groups of 128, 64 and -1; 1,024 rows
    python scripts/bench_methods.py budget      # the same size as 3 bits in groups of 128, and 3.0 bits, by target_bits
    python scripts/bench_methods.py english     # pycode-29m fine-tuned on English
    python scripts/bench_methods.py gpt2        # a GPT-2 (LayerNorm, biases, learned positions) trained on Python code
    python scripts/bench_methods.py all --device cuda

Needs ../shared (pycode-29m and its texts). 1,024 rows and the GPT-2 take the Python files of the machine, without those
that share a fifth of their lines with the texts that judge. A quantized model is dequantized into a float32 copy and
judged as in `bench_accuracy.py`. The seconds are those of `QuantizeModule.quantize`; the first run compiles kernels.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import logging
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_accuracy import MODEL, SHARED, TEXTS, compared, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gptq_plugin import QuantizeModule, QuantLinear
from gptq_plugin.options.methods import METHODS

LENGTH, ROWS, JUDGED = 512, 128, 200
BEST = {"method": "best"}
ZERO_POINTS = {"sym": False, "checkpoint_format": "gptq_v2"}


def _pieces(*names: str) -> dict[str, Any]:
    """Fields of `best`, for the method `gptq`."""
    return {name: METHODS["best"][name] for name in names}


PARTS: dict[str, dict[str, Any]] = {
    "gptq, plain": {"clip_ratios": [1.0]},
    "gptq": {},
    "+ ratios of best": _pieces("clip_ratios", "clip_candidates"),
    "+ rounds of scales": _pieces("clip_ratios", "clip_candidates", "scale_rounds"),
    "+ rounds of refitting": _pieces("clip_ratios", "clip_candidates", "scale_rounds", "refit_rounds"),
    "+ damping .1": {**BEST, "asymmetric_alpha": 0.0},
    "+ asymmetric target: best": BEST,
    "best, every ratio solved": {**BEST, "clip_candidates": 13},
    "best, two ratios, three rounds": {**BEST, "clip_candidates": 2, "scale_rounds": 3},
    "best, damping .01": {**BEST, "damp_percent": 0.01},
    "best, asymmetric_alpha=1": {**BEST, "asymmetric_alpha": 1.0},
    "best, weighted by gradients": {**BEST, "token_weighting": "gradients"},
    "gptq, zero-points": ZERO_POINTS,
    "best, zero-points": {**BEST, **ZERO_POINTS},
}


class Bench:
    """Quantizes and judges one trained model.

    Args:
        model: On the CPU.
        judged: Token rows to judge on, int64 [rows, length].
        device: Where to compute.
        bits: Widths to try.
    """

    def __init__(self, model: nn.Module, judged: Tensor, device: torch.device, bits: list[int]) -> None:
        self._model, self._device, self._bits = model.eval(), device, bits
        self._float = copy.deepcopy(model).float().to(device).eval()
        self._judged = judged.to(device)

    def row(self, label: str, calibration: Tensor, **config: Any) -> None:
        """Prints excess loss, divergence and seconds at each width."""
        cells = []
        for bits in self._bits:
            model = copy.deepcopy(self._model).to(self._device)
            rows = max(8, len(calibration) // 32)  # of a batch
            batches = [{"input_ids": batch} for batch in calibration.to(self._device).split(rows)]
            started = time.perf_counter()
            QuantizeModule(bits=bits, nsamples=len(calibration), **config).quantize(model, batches)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            above, divergence = compared(self._dequantized(model), self._float, self._judged)
            cells.append(f"{above:.5f} ({divergence:.5f}) {seconds:6.1f} s")
        print(f"| {label:<32} | " + " | ".join(cells) + " |", flush=True)

    @torch.no_grad()
    def _dequantized(self, model: nn.Module) -> nn.Module:
        again = copy.deepcopy(self._float)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                weight = again.get_submodule(name).weight
                values = layer.dequantize(torch.float32)
                weight.copy_(values.T if type(again.get_submodule(name)).__name__ == "Conv1D" else values)
        return again


def parts(device: torch.device, bits: list[int]) -> None:
    bench = pycode(device, bits)
    for label, config in PARTS.items():
        bench.row(label, windows(TEXTS / "calib.jsonl", ROWS), **config)


def settings(device: torch.device, bits: list[int]) -> None:
    bench, rows = pycode(device, bits), windows(TEXTS / "calib.jsonl", 560)
    for seed in range(3):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:ROWS]
        for group_size in (128, 64, -1):
            for method in METHODS:
                label = f"{method}, groups of {group_size}, seed {seed}"
                bench.row(label, rows[chosen], method=method, group_size=group_size)
    for method in METHODS:
        bench.row(f"{method}, 1,024 rows", python_rows(1024), method=method)
    bench.row("best, zero-points, 1,024 rows", python_rows(1024), **BEST, **ZERO_POINTS)


def budget(device: torch.device, bits: list[int]) -> None:
    del bits
    bench = pycode(device, [3])
    for target in (None, 3.1484375, 3.0):  # the second is what 3 bits in groups of 128 take with scales
        bench.row(f"best, target_bits={target}", windows(TEXTS / "calib.jsonl", ROWS), target_bits=target, **BEST)


def english(device: torch.device, bits: list[int]) -> None:
    rows = token_rows([(SHARED / "data" / "wikitext-2" / "valid.txt").read_text()])
    judged = token_rows([(SHARED / "data" / "wikitext-2" / "test.txt").read_text()])[:JUDGED]
    model = trained(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), rows, device, steps=200, rate=3e-4
    )
    methods(Bench(model, judged, device, bits), rows[:ROWS])


def gpt2(device: torch.device, bits: list[int]) -> None:
    torch.manual_seed(0)
    tokens = {"vocab_size": len(AutoTokenizer.from_pretrained(MODEL)), "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**tokens, n_positions=LENGTH, n_embd=384, n_layer=8, n_head=6)
    model = trained(GPT2LMHeadModel(config), python_rows(12288), device, steps=1500, rate=1e-3)
    methods(Bench(model, windows(TEXTS / "eval.jsonl", JUDGED), device, bits), windows(TEXTS / "calib.jsonl", ROWS))


def methods(bench: Bench, rows: Tensor) -> None:
    for method in ("gptq", "best"):
        bench.row(method, rows, method=method)


def pycode(device: torch.device, bits: list[int]) -> Bench:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    return Bench(model, windows(TEXTS / "eval.jsonl", JUDGED), device, bits)


def trained(model: nn.Module, rows: Tensor, device: torch.device, *, steps: int, rate: float) -> nn.Module:
    """The model after steps of 32 random rows each: AdamW, a warm-up, a cosine to zero. In bfloat16, on the CPU."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = rows[torch.randint(0, len(rows), (32,), generator=generator)].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"trained for {steps} steps: loss {loss.item():.3f}", flush=True)
    return model.to("cpu", torch.bfloat16).eval()


def python_rows(count: int) -> Tensor:
    """Token rows of the machine's Python files, int64 [count, LENGTH]."""
    held_out = set((TEXTS / "leave-out.txt").read_text().split())
    return token_rows(_python_texts(held_out, characters=5 * count * LENGTH))[:count]


def _python_texts(held_out: set[str], characters: int) -> Iterator[str]:
    paths = sysconfig.get_paths()
    files = sorted({file for root in (paths["purelib"], paths["stdlib"]) for file in Path(root).rglob("*.py")})
    random.Random(1).shuffle(files)
    for file in files:
        text = file.read_text(errors="ignore")
        lines = {_digest(line.strip()) for line in text.split("\n") if len(line.strip()) >= 30}
        if 500 < len(text) < 200_000 and len(lines & held_out) <= 0.2 * len(lines):
            yield text
            characters -= len(text)
        if characters < 0:
            return


def _digest(line: str) -> str:
    return hashlib.sha1(line.encode()).hexdigest()[:12]


def token_rows(texts: Iterable[str]) -> Tensor:
    """Token rows of texts, each after a BOS, int64 [rows, LENGTH]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for one in encoded for token in (tokenizer.bos_token_id, *one)])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


TABLES: Mapping[str, Callable[[torch.device, list[int]], None]] = {
    "parts": parts,
    "settings": settings,
    "budget": budget,
    "english": english,
    "gpt2": gpt2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    for table in TABLES if "all" in arguments.tables else arguments.tables:
        print(f"{table}: loss above the float model's (divergence), at {arguments.bits} bits", flush=True)
        TABLES[table](torch.device(arguments.device), arguments.bits)


if __name__ == "__main__":
    main()
