"""How long do experts take? Blocks of Qwen3-30B-A3B's shape (128 experts, 8 a token) on one GPU.

    python scripts/bench_moe.py             # two blocks; 128 samples of 2048 tokens, 4 bits, group 128
    python scripts/bench_moe.py --layers 1 --samples 32

Random weights and tokens; routers of random weights spread tokens more evenly than trained ones. The floor is the
block's products for all tokens: its forward, and each layer's Hessian, at 680e12 flops a second in bfloat16.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule

BF16 = 680e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--experts", type=int, default=128)
    args = parser.parse_args()
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=2048,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=args.experts,
        num_experts_per_tok=8,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    rows = list(torch.randint(0, 2048, (args.samples, 2048), generator=torch.Generator().manual_seed(0)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.config._experts_implementation = "eager"
        model(torch.stack(rows[:1]).cuda(), use_cache=False, logits_to_keep=1)
    tokens = 2048 * args.samples
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    hessians = args.layers * tokens * (2 * hidden**2 + 4096**2 + 8 * (hidden**2 + inner**2))  # half of 2 n d^2 each
    floor = (counter.get_total_flops() * args.samples + hessians) / BF16
    for name, samples in (("kernels compiled", rows[:8]), ("measured", rows)):
        quantizer = QuantizeModule(QuantizeConfig())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with quantizer.temporarily(model, samples, nsamples=len(samples)) as report:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.1f} s, {seconds / args.layers:.2f} s a block, {report.totals()['modules']} layers")
    few = [module for module in report.quantized if module.tokens < module.shape[1]]
    parts = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    print(f"{parts}; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    times = f"{seconds / floor:.1f} times that"
    print(f"floor {floor / args.layers:.2f} s a block, {times}; {len(few)} layers with few tokens")
    print(f"loss {report.totals()['loss'] / report.totals()['rtn_loss']:.3f} of round-to-nearest's")


if __name__ == "__main__":
    main()
