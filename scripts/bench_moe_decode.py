"""Times one block of experts of Qwen3-30B-A3B's shape for few tokens on one GPU: float, and quantized to 4 bits.

    python scripts/bench_moe_decode.py
    python scripts/bench_moe_decode.py --shape tiny --device cpu   # sees that the script runs, on the CPU's kernels

Two things are timed: the products of both parameters alone, in a CUDA graph of 16 routings at random, so that weights
come from memory; and a call of the block, with its router and everything around the products, one after the other and
in a CUDA graph (whose weights come from the cache where they fit).
The floor is the bytes of the experts that are reached, at 3.35e12 bytes a second.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_moe import build
from torch import Tensor

from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.layers.stored_weight import arrange_layers
from gptq_plugin.layers.swap import swap_modules
from gptq_plugin.model.experts import unfused
from gptq_plugin.model.experts_at_once import find_grouped, stack_experts

BANDWIDTH = 3.35e12
ROUTINGS = 16


def quantized(block: Any) -> Any:
    """A copy of the block whose experts are quantized layers of random codes."""
    made = copy.deepcopy(block)
    with unfused(made):
        layers = {}
        for name, layer in made.named_modules():
            if name.startswith("experts.") and isinstance(layer, torch.nn.Linear):
                layers[name] = QuantLinear(layer.in_features, layer.out_features, 4, min(128, layer.in_features))
                layers[name].to(layer.weight.device)
                layers[name].qweight.random_(-(2**31), 2**31 - 1)
                layers[name].qzeros.fill_(-0x77777778)  # 8, eight times
                layers[name].scales.fill_(0.01)
        swap_modules(made, layers)
    return made


def routed(tokens: int, experts: int, chosen: int, device: str) -> Tensor:
    """Where the rows of experts end, if each token goes to some at random: int32 [experts]."""
    scores = torch.rand(tokens, experts, device=device)
    counts = torch.bincount(scores.topk(chosen).indices.flatten(), minlength=experts)
    return counts.cumsum(0, dtype=torch.int32)


def timed(call: Callable[[], object], device: str, times: int = 20) -> float:
    """Seconds of a call."""
    call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - started) / times


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def replayed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call that is captured in a CUDA graph."""
    call()
    if device == "cpu":
        return timed(call, device, 2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("qwen3", "mixtral", "tiny"), default="qwen3")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    block = build(args.shape, 1, args.device, args.device).model.layers[0].mlp
    experts, chosen = block.experts.num_experts, block.gate.top_k
    hidden, inner = block.experts.gate_up_proj.shape[2], block.experts.down_proj.shape[2]
    made = quantized(block)
    arrange_layers(made)
    block.experts.config = copy.copy(block.experts.config)
    block.experts.config._experts_implementation = "grouped_mm"
    one_by_one = dict.fromkeys(args.tokens, 0.0)
    inputs = {tokens: torch.randn(1, tokens, hidden, device=args.device).bfloat16() for tokens in args.tokens}
    for tokens in args.tokens:
        one_by_one[tokens] = timed(lambda x=inputs[tokens]: made(x), args.device, 5)
    print("stacked:", stack_experts(made))
    calls = [one.call for one in find_grouped(made)]
    weights = [block.experts.gate_up_proj, block.experts.down_proj]
    for tokens in args.tokens:
        x = [torch.randn(tokens * chosen, width, device=args.device).bfloat16() for width in (hidden, inner)]
        routings = [routed(tokens, experts, chosen, args.device) for _ in range(ROUTINGS)]

        def floats(x: Any = x, routings: Any = routings) -> None:
            for ends in routings:
                for own, weight in zip(x, weights, strict=True):
                    torch.nn.functional.grouped_mm(own, weight.mT, offs=ends)

        def codes(x: Any = x, routings: Any = routings) -> None:
            for ends in routings:
                for own, call in zip(x, calls, strict=True):
                    call(own, ends)

        reached = sum(int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum()) for ends in routings) / ROUTINGS
        bytes_each = 3 * hidden * inner * (0.5 + 2 / 128)
        products = [1e6 * replayed(call, args.device) / ROUTINGS for call in (floats, codes)]
        whole = [1e6 * timed(lambda one=one, x=inputs[tokens]: one(x), args.device, 200) for one in (block, made)]
        graphs = [1e6 * replayed(lambda one=one, x=inputs[tokens]: one(x), args.device) for one in (block, made)]
        print(
            f"{tokens} tokens, {reached:.1f} experts: products float {products[0]:.1f} us, quantized "
            f"{products[1]:.1f} us (floor {1e6 * reached * bytes_each / BANDWIDTH:.1f}); the block float "
            f"{whole[0]:.0f} us, quantized {whole[1]:.0f} us, in a graph {graphs[0]:.1f} and {graphs[1]:.1f} us, "
            f"expert by expert {1e6 * one_by_one[tokens]:.0f} us",
            flush=True,
        )


if __name__ == "__main__":
    main()
