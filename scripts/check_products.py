"""Checks QuantLinear's products on a GPU: their errors, and that repeated runs have the same bytes.

    python scripts/check_products.py --runs 3000
    env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --padding 262144 python scripts/check_products.py --rows 1,16

Kernels are those that a layer has on this GPU. The error against float64 may be 1.05 times that of the dequantized
weight's product. The memory that an output gets holds NaN before. Without its cache PyTorch allocates each tensor by
itself, and with the padding none lies next to another, so that `compute-sanitizer` sees what is outside of one.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from bench_qlinear import GPU, errors, random_layer
from gptq_plugin.kernels.product import products
from torch import Tensor

from gptq_plugin.layers.qlinear import QuantLinear

ROWS = "1,4,8,16,32,64,65,128,129,256,300,2048"
BATCH = 50  # runs that are compared before the GPU is waited for


def arranged_layer(n_in: int, n_out: int, bits: int, group_size: int, symmetric: bool) -> QuantLinear:
    layer = random_layer(n_in, n_out, bits, group_size, "cuda", symmetric)
    if not layer.arrange():
        raise SystemExit(f"the kernels do not take groups of {group_size}")
    return layer


def different_runs(layer: QuantLinear, x: Tensor, runs: int) -> int:
    """How many of so many runs differ from the first."""
    first, different = layer(x), 0
    for begin in range(0, runs, BATCH):
        same = []
        for _ in range(min(BATCH, runs - begin)):
            torch.full_like(first, torch.nan)  # in the memory that the output is about to have
            same.append((layer(x) == first).all())
        different += int((~torch.stack(same)).sum())
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", default=GPU["shapes"], help="default: %(default)s")
    parser.add_argument("--rows", default=ROWS, help="default: %(default)s")
    parser.add_argument("--bits", default="4,3,2,8", help="default: %(default)s")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--runs", type=int, default=1, help="of each product, beside the first")
    options = parser.parse_args()
    shapes, widths, numbers = (getattr(options, name).split(",") for name in ("shapes", "bits", "rows"))
    dtype, wrong, checked = getattr(torch, options.dtype), 0, 0
    for shape, bits, symmetric in itertools.product(shapes, map(int, widths), (True, False)):
        n_in, n_out = map(int, shape.split("x"))
        layer = arranged_layer(n_in, n_out, bits, options.group_size, symmetric)
        arranged = layer.arranged()
        assert arranged is not None
        for rows in map(int, numbers):
            x = torch.randn(rows, n_in, dtype=dtype, device="cuda")
            with torch.no_grad():
                (error, of_float), different = errors(layer, x), different_runs(layer, x, options.runs)
            parts = products.parts(arranged.layout, rows, dtype, x.device)
            bad = different or not error <= 1.05 * of_float
            wrong, checked = wrong + bool(bad), checked + 1
            kernels = " + ".join(f"{number} rows by {choice}" for number, choice in parts)
            told = f"error {error:.1e} ({of_float:.1e}), {different} of {options.runs} runs differ; {kernels}"
            grid = "symmetric" if symmetric else "zero-points"
            print("WRONG" if bad else "right", shape, f"{bits} bits, {grid}, M={rows}:", told, flush=True)
    print(f"{checked} products, {wrong} wrong; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
