"""How long does a layer take to solve? Milliseconds on a GPU by part, for Llama-3-8B's shapes.

    python scripts/bench_solver.py

`columns` is the recursion over all columns (a launch a block of 128, and the products between blocks), `factor`
the Cholesky factor, `all` everything `solve` does: round-to-nearest and both losses beside. Random weights, inputs
with very different scales.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from gptq_plugin import QuantizeConfig, solver

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))  # (out, in), gate and up stacked


def milliseconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats * 1e3


def measure(weight: torch.Tensor, hessian: torch.Tensor, config: QuantizeConfig) -> str:
    rows = weight.shape[0]
    order = solver._visiting_order(hessian, config)
    ordered = hessian[order][:, order]
    factor, _, _ = solver._factorize(ordered, config)
    assert factor is not None
    span = torch.tensor(config.clip_ratios, device="cuda").repeat_interleave(rows)
    stacked = weight.repeat(len(config.clip_ratios), 1)
    times = {
        "factor": lambda: solver._factorize(ordered, config),
        "columns": lambda: solver._visit_columns(stacked, factor, order, span, config),
        "all": lambda: solver.solve(weight, hessian, config),
    }
    return "  ".join(f"{name} {milliseconds(call):.1f}" for name, call in times.items())


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds")
    for rows, n in SHAPES:
        x = torch.randn(2 * n, n, device="cuda") * torch.logspace(-1, 1, n, device="cuda")
        hessian, weight = x.T @ x / len(x), torch.randn(rows, n, device="cuda") * 0.02
        for ratios in ((1.0,), QuantizeConfig().clip_ratios):
            figures = measure(weight, hessian, QuantizeConfig(clip_ratios=ratios))
            print(f"{rows} x {n}, {len(ratios)} clip ratios: {figures}", flush=True)


if __name__ == "__main__":
    main()
