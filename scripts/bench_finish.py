"""Measures what a finish leaves of the loss of accuracy on pycode-29m, and what its steps take.

    python scripts/bench_finish.py                              # 4, 3 and 2 bits, scales, 65 k tokens
    python scripts/bench_finish.py --corpus --steps 512 --learning-rate 2e-3 --nsamples 8192    # 4 M tokens
    python scripts/bench_finish.py --kind blocks                # blocks, then scales
    python scripts/bench_finish.py --large                      # seconds and memory of steps of the 8B shape, on a GPU
    python scripts/bench_finish.py --large 3 --kind blocks      # the same of its blocks, from the CPU

Needs ../shared (the model and its texts). Judged as in bench_accuracy.py, from the exported files: the mean loss above
the float model's and the mean divergence from it on the first 200 windows of 512 tokens of eval.jsonl. Calibration is
on the first 128 rows of calib.jsonl, the finish trains on those, and holds out the rows behind them. --corpus trains on
this machine's Python files instead, without any that shares a fifth of its lines with calibration's or evaluation's
texts (leave-out.txt), and calibrates on the first --calibration rows of these.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_accuracy import AUTOROUND, MODEL, SHARED, TEXTS, compared, windows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gptq_plugin import Finish, QuantizeModule, QuantLinear, load_quantized

LEAVE_OUT = SHARED / "data" / "pycode" / "leave-out.txt"


def corpus(rows: int, length: int = 512, seed: int = 1, chunk: int = 500) -> torch.Tensor:
    """Rows of this machine's Python files, each file after a BOS: int64 [rows, length]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = []
    texts = _texts(seed)
    while len(ids) < rows * length and (some := list(islice(texts, chunk))):
        for one in tokenizer(some, add_special_tokens=False)["input_ids"]:
            ids += [tokenizer.bos_token_id, *one]
    count = min(rows, len(ids) // length)
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _texts(seed: int) -> Iterator[str]:
    left_out = set(LEAVE_OUT.read_text().split())
    folders = {sysconfig.get_paths()[name] for name in ("purelib", "stdlib")}
    files = sorted({file for folder in folders for file in Path(folder).rglob("*.py")})
    random.Random(seed).shuffle(files)
    seen: set[bytes] = set()
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.md5(text.encode()).digest()
        if not 500 < len(text) < 200_000 or "generated" in text[:300].lower() or digest in seen:
            continue
        seen.add(digest)
        lines = {line.strip() for line in text.split("\n") if len(line.strip()) >= 30}
        hashes = {hashlib.sha1(line.encode()).hexdigest()[:12] for line in lines}
        if len(hashes & left_out) <= 0.2 * len(hashes):
            yield text


def float_copy(folder: str, original: nn.Module) -> nn.Module:
    """The export as a float model, whatever kernels there are."""
    model = copy.deepcopy(original)
    loaded = load_quantized(folder, dtype=torch.float32)
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantLinear):
            model.get_submodule(name).weight.data.copy_(layer.dequantize())
    for name, parameter in loaded.named_parameters():
        model.get_parameter(name).data.copy_(parameter)
    return model


def measure(
    bits: int,
    method: str,
    finishes: list[Finish],
    calibration: list[Any],
    rows: list[Any],
    evaluation: torch.Tensor,
    device: str,
    precision: str = "highest",
) -> None:
    """Quantizes, exports, and finishes the same once for each; prints a line of figures of each."""
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    model = copy.deepcopy(original)
    quantizer = QuantizeModule(bits=bits, method=method, nsamples=len(calibration))
    started = time.perf_counter()
    quantizer.quantize(model, calibration)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        quantizer.export(model, f"{folder}/gptq")
        before = compared(float_copy(f"{folder}/gptq", original), original, evaluation)
        print(f"{bits} bits  {method}  +{before[0]:.5f} KL {before[1]:.5f}  {seconds:.1f} s", flush=True)
        for number, finish in enumerate(finishes):
            started = time.perf_counter()
            torch.set_float32_matmul_precision(precision)
            record = quantizer.finish(model, original, rows, finish)
            torch.set_float32_matmul_precision("highest")
            seconds = time.perf_counter() - started
            quantizer.export(model, f"{folder}/{number}")
            after = compared(float_copy(f"{folder}/{number}", original), original, evaluation)
            quantizer.undo_finish("the next is tried")
            of_peer = f"  {after[1] / AUTOROUND[bits]:.2f} of AutoRound's KL" if bits in AUTOROUND else ""
            print(
                f"{bits} bits  {finish.kind}  {finish.steps} steps at {finish.rates(bits).scales:g}  +{after[0]:.5f} "
                f"KL {after[1]:.5f}{of_peer}  {seconds:.1f} s  best step {record.best_step} of {record.steps}, held "
                f"out {record.before:.5f} to {record.after:.5f}, {'kept' if record.kept else 'not kept'}",
                flush=True,
            )
            print(f"    held out: {' '.join(f'{one.step}:{one.held_out:.5f}' for one in record.curve)}", flush=True)
            for block in record.blocks:
                print(f"    {block.summary()}", flush=True)


def large_blocks(layers: int, steps: int, tokens: int) -> None:
    """The training of blocks of the 8B shape with random weights, on a GPU, of models on the CPU; 65,536 tokens."""
    model = _model(layers, "cuda")
    teacher = copy.deepcopy(model).cpu()
    quantizer = QuantizeModule(bits=4)
    quantizer.round_to_nearest(model)
    model.cpu()
    torch.cuda.empty_cache()
    rows = list(torch.randint(0, 128256, (36, 2048)))
    finish = Finish(
        "blocks",
        steps=1,
        block_steps=steps,
        tokens_per_step=tokens,
        nsamples=32,
        held_out=4,
        batch_size=4,
        judgements=1,
    )
    marks: list[float] = []
    peaks: list[int] = []

    def mark(done: int, at_most: int, text: str) -> None:
        if "block" in text:
            marks.append(time.perf_counter())
            if peaks or len(marks) > 1:
                peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    started = time.perf_counter()
    quantizer.finish(model, teacher, rows, finish, device="cuda", progress=mark)
    lines = [f"{layers} blocks of the 8B shape, {tokens} tokens a step; {marks[0] - started:.1f} s before the first"]
    for number in range(layers):
        first, last = marks[2 * number : 2 * number + 2]
        between = f", {marks[2 * number + 2] - last:.1f} s to the next" if number + 1 < layers else ""
        lines.append(f"block {number}: {(last - first) / steps:.2f} s a step{between}")
    lines.append(f"peak {max(peaks) / 2**30:.1f} GiB")
    print("\n".join(lines), flush=True)


def _model(layers: int, device: str) -> nn.Module:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def large(layers: int, steps: int, tokens: int) -> None:
    """Steps of the 8B shape with random weights on a GPU."""
    model = _model(layers, "cuda")
    teacher = copy.deepcopy(model)
    quantizer = QuantizeModule(bits=4)
    quantizer.round_to_nearest(model)
    held = sum(one.numel() * one.element_size() for one in teacher.parameters())
    for reruns in (False, True):
        rows = list(torch.randint(0, 128256, (steps * tokens // 2048 + 4, 2048)))
        finish = Finish(
            steps=steps, tokens_per_step=tokens, nsamples=len(rows) - 4, held_out=4, batch_size=4, judgements=1,
            checkpoint_activations=reruns,
        )  # fmt: skip
        started: list[float] = []
        try:
            quantizer.finish(
                model,
                teacher,
                rows,
                finish,
                progress=lambda *_: started.append(time.perf_counter()),  # noqa: B023
            )
        except torch.OutOfMemoryError as error:
            print(f"activations twice: {reruns}: {error}"[:200], flush=True)
            continue
        peak = torch.cuda.max_memory_allocated() - held
        print(
            f"{layers} blocks of the 8B shape, {tokens} tokens a step, activations "
            f"{'computed twice' if reruns else 'kept'}: {(started[1] - started[0]) / steps:.2f} s a step (judging "
            f"included), {peak / 2**30:.1f} GiB beside the float model's {held / 2**30:.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--method", default="best")
    parser.add_argument("--kind", choices=["scales", "blocks", "full"], default="scales")
    parser.add_argument("--block-steps", type=int, default=200)
    parser.add_argument("--block-learning-rate", type=float)
    parser.add_argument("--block-code-learning-rate", type=float)
    parser.add_argument("--code-learning-rate", type=float, help="behind the blocks, for full")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[None])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--top-logits", type=int)
    parser.add_argument("--windows", type=int, default=200, help="of evaluation")
    parser.add_argument("--corpus", action="store_true", help="train on this machine's Python files")
    parser.add_argument("--calibration", type=int, default=1024, help="rows of the corpus for GPTQ")
    parser.add_argument("--large", type=int, nargs="?", const=32, help="blocks of the 8B shape to measure steps of")
    parser.add_argument("--tf32", action="store_true", help="products of a finish in TF32, as trainers may set it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.large is not None:
        (large if arguments.kind == "scales" else large_blocks)(arguments.large, 8, 8192)
        return
    count = arguments.nsamples + arguments.held_out
    started = time.perf_counter()
    rows = corpus(count) if arguments.corpus else windows(TEXTS / "calib.jsonl", count)
    calibration = list(rows[: arguments.calibration] if arguments.corpus else windows(TEXTS / "calib.jsonl", 128))
    print(
        f"{len(rows)} rows, {len(calibration)} of calibration, made in {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    evaluation = windows(TEXTS / "eval.jsonl", arguments.windows).to(arguments.device)
    finishes = [
        Finish(
            arguments.kind,
            steps=arguments.steps,
            learning_rate=rate,
            code_learning_rate=arguments.code_learning_rate,
            block_steps=arguments.block_steps,
            block_learning_rate=arguments.block_learning_rate,
            block_code_learning_rate=arguments.block_code_learning_rate,
            nsamples=len(rows) - arguments.held_out,
            held_out=arguments.held_out,
            batch_size=arguments.batch_size,
            top_logits=arguments.top_logits,
        )
        for rate in arguments.learning_rate
    ]
    print(f"torch {torch.__version__}, {finishes[0]}", flush=True)
    for bits in arguments.bits:
        precision = "high" if arguments.tf32 else "highest"
        measure(bits, arguments.method, finishes, calibration, list(rows), evaluation, arguments.device, precision)


if __name__ == "__main__":
    main()
