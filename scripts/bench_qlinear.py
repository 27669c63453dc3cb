"""Times QuantLinear against a float layer and, on a GPU, against the memory's bandwidth.

    python scripts/bench_qlinear.py                  # the GPU if there is one, else the CPU
    python scripts/bench_qlinear.py --device cpu --threads 2 --shapes 4096x4096 --rows 1,16,128

On a GPU every number is the replay of one CUDA graph over copies of the weights that together exceed the cache; `ideal`
is the time to read codes and scales once at 4.3 TB/s (an H200's measured copy). The columns `fused` and `scratch`
(CUDA), `int4` and `tiles` (CPU) are the layer's implementations; `QuantLinear` is the one it selects.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from gptq_plugin.kernels import reference
from torch import Tensor
from torch.nn.functional import linear

from gptq_plugin.layers.qlinear import QuantLinear

BYTES_PER_SECOND = 4.3e12
ROTATE_BYTES = 256 * 2**20


def random_layer(n_in: int, n_out: int, bits: int, group_size: int, device: str) -> QuantLinear:
    layer = QuantLinear(n_in, n_out, bits, group_size, device=device)
    for words in (layer.qweight, layer.qzeros):
        words.random_(-(2**31), 2**31 - 1)
    layer.scales.uniform_(0.001, 0.01)
    return layer


def packed(layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bits


def cpu_seconds(call: Callable[[], object]) -> float:
    """Seconds of the fastest call within a fifth of a second, after a warm-up."""
    call()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < 0.2:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
    return best


def gpu_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds per call: the median of 20 replays of a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(22):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return sorted(times[2:])[10]


def bench_cpu(n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype) -> dict[str, float]:
    layer = random_layer(n_in, n_out, bits, group_size, "cpu")
    x, weight = torch.randn(rows, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
    int4 = layer._prepare().int4
    times = {"float": cpu_seconds(lambda: linear(x, weight)), "QuantLinear": cpu_seconds(lambda: layer(x))}
    if int4 is not None and dtype == torch.bfloat16:
        times["int4"] = cpu_seconds(lambda: int4.matmul(x, None))
    times["tiles"] = cpu_seconds(lambda: reference.matmul(x, *packed(layer)))
    return times


def bench_gpu(n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype) -> dict[str, float]:
    from gptq_plugin.kernels import matmul

    x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
    one = random_layer(n_in, n_out, bits, group_size, "cuda")
    size = sum(t.numel() * t.element_size() for t in (one.qweight, one.scales))
    layers = [random_layer(n_in, n_out, bits, group_size, "cuda") for _ in range(-(-ROTATE_BYTES // size))]
    copies = -(-ROTATE_BYTES // (n_in * n_out * x.element_size())) + 1
    weights = [torch.randn(n_out, n_in, dtype=dtype, device="cuda") for _ in range(copies)]

    def product(layer: QuantLinear, threshold: int) -> Callable[[], object]:
        def call() -> object:
            chosen, matmul.SCRATCH_ROWS = matmul.SCRATCH_ROWS, threshold
            try:
                return matmul.quant_matmul(x, *packed(layer), group_size=layer._prepare().group_size)
            finally:
                matmul.SCRATCH_ROWS = chosen

        return call

    times = {"float": gpu_seconds([lambda w=w: linear(x, w) for w in weights])}  # type: ignore[misc]
    times["QuantLinear"] = gpu_seconds([lambda q=q: q(x) for q in layers])  # type: ignore[misc]
    times["fused"] = gpu_seconds([product(q, rows + 1) for q in layers])
    times["scratch"] = gpu_seconds([product(q, 0) for q in layers[:8]])
    times["ideal"] = size / BYTES_PER_SECOND
    return times


CPU = {"shapes": "512x512,4096x4096,4096x14336", "rows": "1,8,64,128,256", "dtypes": "bfloat16,float32"}
GPU = {
    "shapes": "4096x4096,4096x14336,14336x4096,8192x28672",
    "rows": "1,16,64,256,2048",
    "dtypes": "float16",
}


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    for name in CPU:
        parser.add_argument(f"--{name}", help=f"comma-separated; CPU: {CPU[name]}; GPU: {GPU[name]}")
    parser.add_argument("--bits", default="4", help="widths, comma-separated")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    torch.set_num_threads(options.threads)
    bench, unit, scale = (bench_gpu, "µs", 1e6) if gpu else (bench_cpu, "ms", 1e3)
    print(f"{options.device}, torch {torch.__version__}, group {options.group_size}; {unit} (ratio to float)")
    names = {**(GPU if gpu else CPU), **{k: v for k, v in vars(options).items() if v is not None}}
    choices = (names[name].split(",") for name in ("dtypes", "shapes", "bits", "rows"))
    for dtype, shape, bits, rows in itertools.product(*choices):
        n_in, n_out = map(int, shape.split("x"))
        with torch.no_grad():
            times = bench(n_in, n_out, int(rows), int(bits), options.group_size, getattr(torch, dtype))
        cells = (f"{name} {value * scale:.3f} ({value / times['float']:.2f})" for name, value in times.items())
        print(f"{dtype:8} {shape:>10} {bits} bits M={rows:<5}", "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
