"""Times decoding of a Llama-3-8B-shaped model with quantized layers against float16, on one GPU.

    python scripts/bench_generate.py [--batches 1,16] [--context 512] [--compile] [--fuse] [--attention NAME]

One token a row with a static cache, as the replay of a CUDA graph of the model's own code or, with --compile, of what
torch.compile makes of it; random weights: time does not depend on them. 4 bits, group 128, the output embedding in
float16 or, with --head-bits, quantized too. Peak memory is that of the replays. --kernels lists what a step runs.
"""

from __future__ import annotations

import argparse
import gc
import warnings

import torch
import torch._dynamo
from bench_qlinear import random_layer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gptq_plugin.layers.fuse import fuse_layers
from gptq_plugin.layers.swap import swap_modules

TOKENS = 64


def llama(blocks: int, attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, attn_implementation=attention,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.float16).eval()


def quantize(model: nn.Module, names: list[str], bits: int) -> None:
    for name in names:
        old = model.get_submodule(name)
        layer = random_layer(old.in_features, old.out_features, bits, 128, "cuda", True)
        layer.scales.mul_(0.1)
        assert layer.arrange()
        swap_modules(model, {name: layer})
        del old
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def seconds_a_token(model: LlamaForCausalLM, batch: int, context: int, compiled: bool, kernels: bool) -> float:
    cache = StaticCache(config=model.config, max_cache_len=context + TOKENS + 8)
    ids = torch.randint(0, 128256, (batch, context), device="cuda")
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    position = torch.full((batch, 1), context, device="cuda")

    def step() -> torch.Tensor:
        return model(token, past_key_values=cache, position_ids=position).logits

    if compiled:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True, dynamic=False)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(TOKENS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    if kernels:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            torch.cuda.synchronize()
        found = sorted(profile.key_averages(), key=lambda kernel: -kernel.device_time_total)
        for kernel in found[:16]:
            print(f"  {kernel.device_time_total:7.0f} us, {kernel.count:4d} calls: {kernel.key[:90]}")
        print(
            f"  {sum(kernel.device_time_total for kernel in found):7.0f} us, {sum(k.count for k in found)} calls in all"
        )
    return sorted(times)[TOKENS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,16", help="rows, comma-separated")
    parser.add_argument("--context", type=int, default=512, help="tokens before the ones timed")
    parser.add_argument("--fuse", action="store_true", help="one product for q, k and v, and one for gate and up")
    parser.add_argument("--compile", action="store_true", help="compile a step before it is captured (minutes)")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step by their time")
    parser.add_argument("--head-bits", type=int, help="also time 4 bits with the output embedding in so many")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation, such as flex_attention")
    options = parser.parse_args()
    how = "compiled" if options.compile else "the model's own code"
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.blocks} blocks, "
        f"context {options.context}, {how}, attention: {options.attention}"
    )
    if options.attention == "flex_attention":  # transformers gives its mask an argument that PyTorch warns of
        torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
    model = llama(options.blocks, options.attention)
    found: dict[int, float] = {}
    for label in ("float16", "4 bits", f"4 bits, output embedding {options.head_bits}"):
        if label == "4 bits":
            names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"]
            quantize(model, names, 4)
            if options.fuse:
                print(f"{len(fuse_layers(model, torch.zeros(1, 2, dtype=torch.long, device='cuda')))} groups fused")
        elif label != "float16":
            if not options.head_bits:
                break
            quantize(model, ["lm_head"], options.head_bits)
        for batch in map(int, options.batches.split(",")):
            seconds = seconds_a_token(model, batch, options.context, options.compile, options.kernels)
            gc.collect()
            ratio = f", {found[batch] / seconds:.2f} times float16's" if batch in found else ""
            found.setdefault(batch, seconds)
            print(
                f"{label}, batch {batch}: {batch / seconds:.0f} tokens/s ({seconds * 1e3:.3f} ms a step{ratio}), "
                f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
