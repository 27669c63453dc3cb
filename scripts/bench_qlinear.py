"""Times QuantLinear against a float layer and, on a GPU, against the bytes' floor and PyTorch's 4-bit kernel.

    python scripts/bench_qlinear.py                  # the GPU if there is one, else the CPU
    python scripts/bench_qlinear.py --device cpu --threads 2 --shapes 4096x4096 --rows 1,16,128

On a GPU every number is the replay of one CUDA graph over copies of the weights that together exceed the cache, and
every layer's result is compared with that of its dequantized weight first. `floor` is codes, scales, x and y once at
3.0 TB/s (what an H100 reads); `standard` is the kernel for a checkpoint's layout, `tinygemm` PyTorch's (bfloat16, at
most 16 rows). The columns `int4` and `tiles` (CPU) are the layer's implementations; `QuantLinear` is the one it
selects, and on a GPU the line ends with it.
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

from gptq_plugin.layers.packing import pack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

BYTES_PER_SECOND = 3.0e12
ROTATE_BYTES = 256 * 2**20


def random_layer(n_in: int, n_out: int, bits: int, group_size: int, device: str, symmetric: bool) -> QuantLinear:
    layer = QuantLinear(n_in, n_out, bits, group_size, device=device)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    if symmetric:
        layer.qzeros = pack_zeros(torch.full(layer.scales.shape, 2 ** (bits - 1), dtype=torch.uint8).to(device), bits)
    else:
        layer.qzeros.random_(-(2**31), 2**31 - 1)
    layer.scales.uniform_(0.001, 0.01)
    return layer


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


Times = dict[str, float]


def bench_cpu(
    n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Times, str]:
    layer = random_layer(n_in, n_out, bits, group_size, "cpu", symmetric)
    x, weight = torch.randn(rows, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
    int4 = layer._prepare().int4
    times = {"float": cpu_seconds(lambda: linear(x, weight)), "QuantLinear": cpu_seconds(lambda: layer(x))}
    if int4 is not None and dtype == torch.bfloat16:
        times["int4"] = cpu_seconds(lambda: int4.matmul(x, None))
    times["tiles"] = cpu_seconds(lambda: reference.matmul(x, *layer.packed(), bits))
    return times, ""


def bench_gpu(
    n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Times, str]:
    from gptq_plugin.kernels import matmul
    from gptq_plugin.kernels.product import products

    x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
    size = n_in * n_out * bits / 8 + n_in / group_size * n_out * 2
    layers = [
        random_layer(n_in, n_out, bits, group_size, "cuda", symmetric) for _ in range(-(-ROTATE_BYTES // int(size)))
    ]
    packed = [layer.packed() for layer in layers[:8]]
    weights = [
        torch.randn(n_out, n_in, dtype=dtype, device="cuda")
        for _ in range(-(-ROTATE_BYTES // (n_in * n_out * x.element_size())) + 1)
    ]
    times = {"float": gpu_seconds([lambda w=w: linear(x, w) for w in weights])}  # type: ignore[misc]
    if len(x) <= 256:
        times["standard"] = gpu_seconds(
            [lambda p=p: matmul.quant_matmul(x, *p, bits, group_size=group_size) for p in packed]  # type: ignore[misc]
        )
    if rows <= 16 and bits == 4:
        times["tinygemm"] = tinygemm_seconds(x.bfloat16(), n_out, group_size, len(layers))
    expected = linear(x.double(), layers[0].dequantize().double())
    exact = linear(x, layers[0].dequantize(dtype))
    del packed
    if not all(layer.arrange() for layer in layers):
        raise SystemExit(f"the kernels do not take groups of {group_size}")
    found = layers[0](x)
    error, of_float = ((y.double() - expected).norm() / expected.norm() for y in (found, exact))
    if not error <= 1.05 * of_float:
        raise SystemExit(f"the error is {float(error):.1e}, that of the dequantized weight's product {of_float:.1e}")
    times["QuantLinear"] = gpu_seconds([lambda q=q: q(x) for q in layers])  # type: ignore[misc]
    times["floor"] = (size + 2 * rows * (n_in + n_out)) / BYTES_PER_SECOND
    arranged = layers[0].arranged()
    assert arranged is not None
    return times, str(products.choose(arranged.layout, rows, dtype, x.device))


def tinygemm_seconds(x: Tensor, n_out: int, group_size: int, copies: int) -> float:
    n_in = x.shape[1]
    weights = [
        (
            torch._convert_weight_to_int4pack(
                torch.randint(0, 255, (n_out, n_in // 2), device="cuda", dtype=torch.uint8), 8
            ),
            torch.randn(n_in // group_size, n_out, 2, device="cuda", dtype=torch.bfloat16),
        )
        for _ in range(copies)
    ]
    return gpu_seconds(
        [lambda w=w: torch._weight_int4pack_mm(x, w[0], group_size, w[1]) for w in weights]  # type: ignore[misc]
    )


CPU = {"shapes": "512x512,4096x4096,4096x14336", "rows": "1,8,64,128,256", "dtypes": "bfloat16,float32"}
GPU = {
    "shapes": "4096x4096,4096x14336,14336x4096,8192x28672",
    "rows": "1,4,16,64,256,2048",
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
    parser.add_argument("--zero-points", action="store_true", help="zeros that are not all 2^(bits - 1)")
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
            times, choice = bench(
                n_in, n_out, int(rows), int(bits), options.group_size, getattr(torch, dtype), not options.zero_points
            )
        cells = (f"{name} {value * scale:.3f} ({value / times['float']:.2f})" for name, value in times.items())
        print(f"{dtype:8} {shape:>10} {bits} bits M={rows:<5}", "  ".join(cells), choice, flush=True)


if __name__ == "__main__":
    main()
