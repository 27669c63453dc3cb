"""Times QuantLinear against a float layer and, on a GPU, against the bytes' floor and PyTorch's 4-bit kernel.

    python scripts/bench_qlinear.py                  # the GPU if there is one, else the CPU
    python scripts/bench_qlinear.py --device cpu --threads 2 --shapes 4096x4096 --rows 1,16,128
    python scripts/bench_qlinear.py --bits 8,3,2 --dtypes float16,bfloat16 --zero-points
    python scripts/bench_qlinear.py --ragged         # channels and outputs that fill no tile
    python scripts/bench_qlinear.py --write-table    # measure kernels, and write the package's table for this GPU

On a GPU every number is the replay of one CUDA graph over copies of the weights that together exceed the cache; replays
take turns, and the layer's result is compared with that of its dequantized weight first. `floor` is codes, scales,
zeros, x and y once at 3.0 TB/s (what an H100 reads); `standard` is the kernel for a checkpoint's layout (timed alone),
`tinygemm` PyTorch's (bfloat16, at most 16 rows). A line ends with the time in floors, the error against float64,
relative to the norm, and that of the dequantized weight's product, the largest error of one number in units of the
outputs' root mean square, and the kernel.

On a CPU the calls take turns, each with so many weights one after the other, as in a model, that they exceed the cache;
with one thread its own seconds count. `int4` is PyTorch's 4-bit kernel on bfloat16 rows, up to 128 of them, `before`
the plain definition (`reference.matmul`), up to 16. A line ends with the errors.

With --write-table nothing else is timed: every product of the chosen shapes, bits, rows and dtypes is measured with a
dozen choices of kernels and options, and the fastest are added to the table.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from gptq_plugin.kernels import reference
from torch import Tensor
from torch.nn.functional import linear

from gptq_plugin.layers.cpu_product import CpuProduct
from gptq_plugin.layers.int4_cpu import Int4
from gptq_plugin.layers.packing import pack_zeros
from gptq_plugin.layers.qlinear import QuantLinear

BYTES_PER_SECOND = 3.0e12
ROTATE_BYTES = 256 * 2**20
GRAPH_CALLS = 16  # at least
CPU_ROTATE_BYTES = 64 * 2**20
SECONDS_OF_A_PRODUCT = 3.5  # --write-table, on average

Times = dict[str, float]


def random_layer(n_in: int, n_out: int, bits: int, group_size: int, device: str, symmetric: bool) -> QuantLinear:
    layer = QuantLinear(n_in, n_out, bits, group_size, device=device)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    layer.qweight[-1] &= last_word(n_in * bits)
    if symmetric:
        layer.qzeros = pack_zeros(torch.full(layer.scales.shape, 2 ** (bits - 1), dtype=torch.uint8).to(device), bits)
    else:
        layer.qzeros.random_(-(2**31), 2**31 - 1)
        layer.qzeros[:, -1] &= last_word(n_out * bits)
    layer.scales.uniform_(0.001, 0.01)
    return layer


def last_word(bits: int) -> int:
    """The part of the last word of a row of bits that is used."""
    return (1 << bits % 32) - 1 if bits % 32 else -1


def errors(layer: QuantLinear, x: Tensor) -> tuple[float, float]:
    """The product's error against float64 and that of the dequantized weight's, relative to the norm."""
    expected = linear(x.double(), layer.dequantize(torch.float64))
    found = (layer(x), linear(x, layer.dequantize(x.dtype)))
    error, of_float = (float((y.double() - expected).norm() / expected.norm()) for y in found)
    return error, of_float


def cpu_seconds(calls: Mapping[str, Sequence[Callable[[], object]]], seconds: float = 4.0) -> Times:
    """Seconds of a call in the fastest run of its series, by turns, after a warm-up: others use the machine too, so
    that with one thread its own time is what counts."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in itertools.chain(*calls.values()):
        call()
    start, turns = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or turns < 5:
        turns += 1
        for name, series in calls.items():
            before = now()
            for call in series:
                call()
            best[name] = min(best[name], (now() - before) / len(series))
    return best


def gpu_seconds(calls: Mapping[str, Sequence[Callable[[], object]]]) -> Times:
    """Seconds a call: the median of 20 replays of a graph of each name's calls. Replays take turns, so that all of them
    run at the same clocks. A graph's own start takes some microseconds: it has the calls several times."""
    calls = {name: [*of_name] * -(-GRAPH_CALLS // len(of_name)) for name, of_name in calls.items()}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, of_name in calls.items():
        for call in of_name:
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in of_name:
                call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*graphs] * 22:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        times[name].append(start.elapsed_time(end) * 1e-3 / len(calls[name]))
    return {name: sorted(of_name[2:])[10] for name, of_name in times.items()}


@functools.lru_cache(maxsize=1)
def cpu_layers(
    n_in: int, n_out: int, bits: int, group_size: int, symmetric: bool
) -> list[tuple[QuantLinear, Int4 | None]]:
    """Layers that together exceed the cache, and each for PyTorch's 4-bit kernel where that takes it."""
    layers = [
        random_layer(n_in, n_out, bits, group_size, "cpu", symmetric)
        for _ in range(-(-CPU_ROTATE_BYTES * 8 // (n_in * n_out * bits)))
    ]
    return [(layer, CpuProduct(layer.packed(), bits, layer.channels_per_group()).int4) for layer in layers]


def bench_cpu(
    n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Times, str]:
    layers = cpu_layers(n_in, n_out, bits, group_size, symmetric)
    x = torch.randn(rows, n_in, dtype=dtype)
    weights = [
        torch.randn(n_out, n_in, dtype=dtype) for _ in range(-(-CPU_ROTATE_BYTES // (n_in * n_out * x.element_size())))
    ]
    calls: dict[str, list[Callable[[], object]]] = {
        "float": [functools.partial(linear, x, weight) for weight in weights],
        "QuantLinear": [functools.partial(layer, x) for layer, _ in layers],
    }
    if rows <= 128 and layers[0][1] is not None:
        calls["int4"] = [functools.partial(int4.matmul, x.bfloat16()) for _, int4 in layers if int4 is not None]
    first = layers[0][0]
    if rows <= 16:
        calls["before"] = [lambda: reference.matmul(x, *first.packed(), bits)]
    error, of_float = errors(first, x)
    return cpu_seconds(calls), f"error {error:.1e} ({of_float:.1e})"


def bench_gpu(
    n_in: int, n_out: int, rows: int, bits: int, group_size: int, dtype: torch.dtype, symmetric: bool
) -> tuple[Times, str]:
    from gptq_plugin.kernels import matmul
    from gptq_plugin.kernels.product import products

    x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
    size = n_in * n_out * bits / 8 + -(-n_in // group_size) * n_out * (2 if symmetric else 2 + bits / 8)
    layers = [
        random_layer(n_in, n_out, bits, group_size, "cuda", symmetric) for _ in range(-(-ROTATE_BYTES // int(size)))
    ]
    packed = [layer.packed() for layer in layers[:8]]
    weights = [
        torch.randn(n_out, n_in, dtype=dtype, device="cuda")
        for _ in range(-(-ROTATE_BYTES // (n_in * n_out * x.element_size())) + 1)
    ]
    times: Times = {}
    if len(x) <= 256:
        standard = (partial(matmul.quant_matmul, x, *p, bits, group_size=group_size) for p in packed)
        times = gpu_seconds({"standard": list(standard)})
    calls: dict[str, list[Callable[[], object]]] = {"float": [partial(linear, x, w) for w in weights]}
    if rows <= 16 and bits == 4 and n_in % 128 == 0 and n_out % 8 == 0 and group_size in (32, 64, 128, 256):
        calls["tinygemm"] = tinygemm(x.bfloat16(), n_out, group_size, len(layers))
    expected = linear(x.double(), layers[0].dequantize().double())
    exact = linear(x, layers[0].dequantize(dtype))
    del packed
    if not all(layer.arrange() for layer in layers):
        raise SystemExit(f"the kernels do not take groups of {group_size}")
    found = layers[0](x)
    error, of_float = (float((y.double() - expected).norm() / expected.norm()) for y in (found, exact))
    if not error <= 1.05 * of_float:
        raise SystemExit(f"the error is {error:.1e}, that of the dequantized weight's product {of_float:.1e}")
    largest = float((found.double() - expected).abs().max() / expected.square().mean().sqrt())
    calls["QuantLinear"] = [partial(layer, x) for layer in layers]
    times = gpu_seconds(calls) | times
    times["floor"] = (size + x.element_size() * rows * (n_in + n_out)) / BYTES_PER_SECOND
    arranged = layers[0].arranged()
    assert arranged is not None
    floors = times["QuantLinear"] / times["floor"]
    launches = products.parts(arranged.layout, rows, dtype, x.device)
    choice = " + ".join(
        f"{number} rows by {of_part}" if len(launches) > 1 else str(of_part) for number, of_part in launches
    )
    return times, f"{floors:.2f} floors, error {error:.1e} ({of_float:.1e}), largest {largest:.1e}; {choice}"


def tinygemm(x: Tensor, n_out: int, group_size: int, copies: int) -> list[Callable[[], object]]:
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
    return [partial(torch._weight_int4pack_mm, x, w, group_size, scales) for w, scales in weights]


def write_table(
    shapes: Sequence[str],
    rows: Sequence[str],
    bits: Sequence[str],
    dtypes: Sequence[str],
    group_size: int,
    symmetric: bool,
    file: Path | None,
) -> None:
    """Measures the kernels for every product, and adds the fastest to the table of this GPU."""
    from gptq_plugin.kernels.product import table as tables
    from gptq_plugin.kernels.product.autotune import search, versions
    from gptq_plugin.kernels.product.choice import Gpu
    from gptq_plugin.kernels.product.layout import Layout
    from gptq_plugin.kernels.product.timing import measure

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = Gpu.of(device)
    file = file or Path(tables.__file__).parent / "tables" / f"{tables.slug(gpu.name)}.json"
    table = tables.Table.parse(file.read_bytes()) if file.exists() else tables.Table(gpu.name, gpu.processors)
    if not table.is_for(gpu):
        raise SystemExit(f"{file} is the table of {table.gpu} with {table.processors} processors, not of {gpu}")
    wanted = {}
    for dtype, shape, width, number in itertools.product(dtypes, shapes, bits, rows):
        layout = Layout.of(int(width), group_size, *map(int, shape.split("x")), symmetric)
        if layout is None:
            raise SystemExit(f"the kernels do not take groups of {group_size}")
        kind = getattr(torch, dtype)
        wanted[tables.Key.of(layout, int(number), kind)] = layout, kind
    begun, left = time.perf_counter(), len(wanted)
    for found in search(wanted, gpu, partial(measure, device), SECONDS_OF_A_PRODUCT):
        table.choices[found.key] = found.choice
        first, best = next(iter(found.times.items())), found.times[found.choice]
        left -= 1
        print(
            f"{found}, {best / first[1]:.2f} of {first[0]}, {len(found.times)} measured"
            + ("" if found.complete else ", not all: the time was over"),
            f"[{found.key.n_in}x{found.key.n_out}, {found.key.bits} bits, {found.key.dtype}]",
            flush=True,
        )
    table.made_by = f"scripts/bench_qlinear.py --write-table, {datetime.date.today()}, {versions()}"
    file.write_text(table.to_json(), encoding="utf-8")
    print(f"{file}: {len(table.choices)} choices, {time.perf_counter() - begun:.0f} s; not measured: {left}")


CPU = {"shapes": "1024x1024,4096x4096,4096x14336", "rows": "1,4,16,64,256,2048", "dtypes": "bfloat16,float32"}
GPU = {
    "shapes": "4096x4096,4096x14336,14336x4096,8192x28672",
    "rows": "1,4,16,64,256,2048",
    "dtypes": "float16",
}
RAGGED = "4100x4100,4104x14340,11000x4090"


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
    parser.add_argument("--ragged", action="store_true", help=f"shapes {RAGGED}")
    parser.add_argument(
        "--write-table", nargs="?", type=Path, const=True, metavar="FILE",
        help="measure kernels, and add the fastest to the package's table for this GPU, or to FILE",
    )  # fmt: skip
    options = parser.parse_args()
    gpu = options.device == "cuda"
    torch.set_num_threads(options.threads)
    bench, unit, scale = (bench_gpu, "µs", 1e6) if gpu else (bench_cpu, "ms", 1e3)
    if options.ragged and options.shapes is None:
        options.shapes = RAGGED
    names = {**(GPU if gpu else CPU), **{k: v for k, v in vars(options).items() if v is not None}}
    dtypes, shapes, widths, numbers = (names[name].split(",") for name in ("dtypes", "shapes", "bits", "rows"))
    if options.write_table:
        if not gpu:
            parser.error("--write-table needs a GPU")
        file = None if options.write_table is True else options.write_table
        write_table(shapes, numbers, widths, dtypes, options.group_size, not options.zero_points, file)
        return
    print(f"{options.device}, torch {torch.__version__}, group {options.group_size}; {unit} (ratio to float)")
    for dtype, shape, bits, rows in itertools.product(dtypes, shapes, widths, numbers):
        n_in, n_out = map(int, shape.split("x"))
        with torch.no_grad():
            times, choice = bench(
                n_in, n_out, int(rows), int(bits), options.group_size, getattr(torch, dtype), not options.zero_points
            )
        cells = (f"{name} {value * scale:.3f} ({value / times['float']:.2f})" for name, value in times.items())
        print(f"{dtype:8} {shape:>10} {bits} bits M={rows:<5}", "  ".join(cells), choice, flush=True)


if __name__ == "__main__":
    main()
