"""Times the quantization of a Llama-3-8B-shaped model on one GPU, part by part.

    python scripts/bench_8b.py block    # one block: where each millisecond goes, the floor, the peers' figures
    python scripts/bench_8b.py model    # load to export of the whole model, in memory modes (a), (b) and (c)
    python scripts/bench_8b.py growth   # seconds against tokens, width and layers, and a fit to the cost model
    python scripts/bench_8b.py codes    # codes that differ from the same solver's in float64, and the loss

Random weights: time does not depend on them. 128 samples of 2048 tokens, 4 bits, group 128, static act-order. Peers'
figures are those of shared/notes/performance.md (same GPU, same block).
"""

from __future__ import annotations

import argparse
import gc
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, QuantLinear
from gptq_plugin.gptq import solver
from gptq_plugin.gptq.factor import factorize
from gptq_plugin.gptq.losses import rounding_loss
from gptq_plugin.walk.hessian import Hessian

PEERS = {"GPTQModel 7.7": 17.5, "llm-compressor 0.14": 7.39, "a rough prototype": 0.64}
BF16, FP32 = 680e12, 51e12  # flops per second of this GPU's library products (shared/notes/performance.md)
SAMPLES, LENGTH, BATCH = 128, 2048, 8
PLAIN = {"clip_ratios": (1.0,)}
GIB = 2**30


def llama(layers: int, hidden: int = 4096, device: str = "cuda", vocab: int = 2048) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def samples(count: int = SAMPLES, vocab: int = 2048) -> list[Tensor]:
    return list(torch.randint(0, vocab, (count, LENGTH), generator=torch.Generator().manual_seed(0)))


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def quantize(
    model: torch.nn.Module, rows: list[Tensor], progress: Callable[[int, int, str], None] | None = None, **options: Any
) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    config = QuantizeConfig(**{"nsamples": len(rows), "batch_size": BATCH, **options})
    QuantizeModule(config).quantize(model, rows, progress=progress)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def blocks(layers: int, **options: Any) -> tuple[float, list[float]]:
    """Seconds of a run, and of each block but the first, from its predecessor's last layer to its own."""
    done: list[float] = []

    def progress(_: int, __: int, what: str) -> None:
        if "down_proj" in what:
            done.append(time.perf_counter())

    total = quantize(llama(layers), samples(), progress, **options)
    return total, [after - before for before, after in pairwise(done)]


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def block() -> None:
    shapes = {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
    tokens, weights = SAMPLES * LENGTH, sum(rows * n for rows, n in shapes.values())
    quantize(llama(2), samples(16))  # compiles the kernels
    for label, options in (("clip_ratios=[1.0]", PLAIN), ("default", {}), ("best", {"method": "best"})):
        for batch_size in (BATCH, 2 * BATCH):
            clear()
            total, each = blocks(10, batch_size=batch_size, **options)
            block = statistics.median(each)
            print(
                f"{label}, batch_size={batch_size}: {block:.3f} s a block ({min(each):.3f} to {max(each):.3f}), and "
                f"{total - 10 * block:.2f} s once; peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB",
                flush=True,
            )
            for name, peer in PEERS.items():
                print(f"  {name}: {peer} s, {peer / block:.1f} times as long")
    clear()
    parts: dict[str, float] = {}
    model = llama(4)
    rows = torch.stack(samples()).cuda().split(BATCH)

    @torch.no_grad()
    def forward() -> None:
        for ids in rows:
            model.model(input_ids=ids, use_cache=False)

    parts["forward"] = seconds(forward) / 4
    model.to("meta")
    for n, times_used in ((4096, 3), (14336, 1)):
        x, hessian = (
            torch.randn(BATCH * LENGTH, n, device="cuda", dtype=torch.bfloat16),
            Hessian(n, "cuda", exact=False),
        )
        parts[f"Hessian {n}"] = seconds(lambda: hessian.add(x)) * SAMPLES / BATCH * times_used  # noqa: B023
    for label, config in (
        ("plain", QuantizeConfig(**PLAIN)),
        ("default", QuantizeConfig()),
        ("best", QuantizeConfig(method="best")),
    ):
        for name, (count, n) in shapes.items():
            clear()
            x = torch.randn(2 * n, n, device="cuda") * torch.logspace(-1, 1, n, device="cuda")
            mean, weight = x.T @ x / len(x), torch.randn(count, n, device="cuda", dtype=torch.bfloat16) * 0.02
            wide = weight.float()
            factor, _ = factorize(mean[None], config, torch.float32, config.damp_percent)
            parts[f"{label} {name}: factor"] = seconds(
                lambda: factorize(mean[None], config, torch.float32, 0.01)  # noqa: B023
            )
            parts[f"{label} {name}: columns"] = seconds(
                lambda: solver.begun(wide[None], mean, factor, config).visit()  # noqa: B023
            )
            parts[f"{label} {name}: RTN's loss"] = seconds(
                lambda: rounding_loss(wide[None], mean, config)  # noqa: B023
            )
            parts[f"{label} {name}: all"] = seconds(lambda: solver.solve(weight, mean, config))  # noqa: B023
            found = solver.solve(weight, mean, config).weight
            parts[f"{label} {name}: pack"] = seconds(
                lambda: QuantLinear.from_quantized(found).dequantize(torch.bfloat16)  # noqa: B023
            )
    print("one part at a time, milliseconds:")
    for name, value in parts.items():
        print(f"  {name}: {value * 1e3:.1f}")
    half = {n: n * n * tokens for n in (4096, 14336)}
    floor = {
        "forward": 2 * weights * tokens / BF16,
        "Hessians, half of each": (3 * half[4096] + half[14336]) / BF16,
        "factors": sum(n**3 / 3 for _, n in shapes.values()) / FP32,
        "columns": sum(count * n * n for count, n in shapes.values()) / FP32,
    }
    print("floor, milliseconds: " + ", ".join(f"{k} {v * 1e3:.0f}" for k, v in floor.items()), end="")
    print(f"; together {sum(floor.values()):.3f} s")


def model_run(folder: Path, limit: float | None, target: Path) -> float:
    """Runs load to export in this process, and prints each phase."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else limit * GIB / total)
    clear()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    quantizer = QuantizeModule(nsamples=SAMPLES, batch_size=BATCH)
    report = quantizer.quantize(model, samples(vocab=128256), device="cuda", export_dir=target, overwrite=True)
    done = time.perf_counter()
    phases = {"load": loaded - started, **report.seconds}
    print(f"limit {limit or total / GIB:.0f} GiB: {done - started:.1f} s, " + ", ".join(
        f"{name} {value:.1f}" for name, value in phases.items()
    ))  # fmt: skip
    print(f"  peak on the device {torch.cuda.max_memory_reserved() / GIB:.1f} GiB")
    print(f"  {sum(file.stat().st_size for file in target.glob('*.safetensors')) / 1e9:.2f} GB written", flush=True)
    return report.seconds["total"]


def whole() -> None:
    quantize(llama(2), samples(16))  # compiles the kernels
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # like a model in the page cache
    with tempfile.TemporaryDirectory(dir=memory) as source, tempfile.TemporaryDirectory() as place:
        folder, target = Path(source, "float"), Path(place, "quantized")
        model = llama(32, vocab=128256)
        model.save_pretrained(folder, max_shard_size="5GB")
        del model
        times = {}
        for mode, limit in (("a", None), ("b", 24.0), ("c", 12.0)):
            print(f"mode ({mode})")
            try:
                times[mode] = model_run(folder, limit, target)
            except torch.OutOfMemoryError as error:
                print(f"  out of memory: {error}")
            else:
                print(f"  {times[mode] / times['a']:.2f} times mode (a), without load and export", flush=True)
            clear()
            shutil.rmtree(target, ignore_errors=True)


def growth() -> None:
    runs: list[tuple[str, int, int, int]] = []
    runs += [("tokens", n, 4096, 2) for n in (16, 32, 64, 128, 256, 512)]
    runs += [("width", 128, hidden, 2) for hidden in (1024, 2048, 4096, 8192)]
    runs += [("layers", 64, 2048, layers) for layers in (2, 4, 8, 16)]
    for hidden in sorted({hidden for _, _, hidden, _ in runs}):
        quantize(llama(1, hidden), samples(16))  # compiles the kernels for its sizes
    measured = []
    for _, count, hidden, layers in runs:
        clear()
        measured.append(quantize(llama(layers, hidden), samples(count)))
    # Fit relative errors, or a run of 7 s would outweigh one of 0.6 s; scaled columns keep the solution stable.
    rows = torch.tensor([cost(count * LENGTH, *shape) for _, count, *shape in runs], dtype=torch.float64)
    weighted = rows / torch.tensor(measured, dtype=torch.float64)[:, None]
    size = weighted.norm(dim=0)
    rates = torch.linalg.lstsq(weighted / size, weighted.new_ones(len(runs), 1)).solution.flatten() / size
    print("seconds = {:.2f} + {:.3g}·flops of forward and Hessians + {:.3g}·activations".format(*rates.tolist()))
    print("| grows | tokens | width | layers | seconds | model |\n|---|---|---|---|---|---|")
    for (what, count, hidden, layers), found, model in zip(runs, measured, (rows @ rates).tolist(), strict=True):
        print(f"| {what} | {count * LENGTH} | {hidden} | {layers} | {found:.2f} | {model:.2f} |")


def codes() -> None:
    """Compares codes on inputs like a network's: strongly correlated, and of very different magnitudes."""
    config = QuantizeConfig()
    print("| out x in | clip ratios | codes that differ | loss / loss in float64 - 1 | rows with a difference |")
    print("|---|---|---|---|---|")
    for rows, n in ((1024, 4096), (1024, 14336)):
        torch.manual_seed(0)
        mix = torch.randn(n, n // 8, device="cuda") @ torch.randn(n // 8, n, device="cuda") / n + torch.eye(
            n, device="cuda"
        )
        hessian = Hessian(n, "cuda")
        for _ in range(4):
            x = torch.randn(n, n, device="cuda") @ mix * torch.logspace(-1, 1, n, device="cuda")
            hessian.add(x.bfloat16())
        mean, weight = hessian.mean(), torch.randn(rows, n, device="cuda") * 0.02
        for ratios in ((1.0,), config.clip_ratios):
            asked = QuantizeConfig(clip_ratios=ratios)
            exact, found = solver.solve(weight, mean.double(), asked), solver.solve(weight, mean, asked)
            other = exact.weight.codes != found.weight.codes
            loss = float(found.loss.double().sum() / exact.loss.sum()) - 1
            print(
                f"| {rows} x {n} | {len(ratios)} | {float(other.double().mean()):.2e} | {loss:.1e} | "
                f"{float(other.any(1).double().mean()):.3f} |",
                flush=True,
            )


def cost(tokens: int, hidden: int, layers: int) -> tuple[float, float, float]:
    """Terms of the cost model: one per run, flops on tensor cores, activations at layers' inputs. Solving takes less
    than a fifth at these sizes."""
    h, f = hidden, hidden * 7 // 2
    groups = ((1.5 * h, h), (h, h), (2 * f, h), (h, f))  # (rows, inputs)
    return 1.0, layers * sum(2 * rows * n * tokens + n * n * tokens for rows, n in groups), layers * tokens * hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("block", "model", "growth", "codes"))
    what = parser.parse_args().what
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("gptq_plugin.quantize.batch_runs").setLevel(logging.INFO)  # logs what stays on the device
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    {"block": block, "model": whole, "growth": growth, "codes": codes}[what]()


if __name__ == "__main__":
    main()
