"""Times blocks of experts of Qwen3-30B-A3B's shape (128 experts, 8 per token) on one GPU.

    python scripts/bench_moe.py             # two blocks; 128 samples of 2048 tokens, 4 bits, group 128
    python scripts/bench_moe.py --layers 1 --samples 32

Weights and tokens are random; random routers spread tokens more evenly than trained ones. The floor is the time of the
block's products for all tokens, its forward and each layer's Hessian, at 680e12 flops per second in bfloat16.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.quantize.options import PassOptions

BF16 = 680e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
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
    hidden, inner, heads = config.hidden_size, config.moe_intermediate_size, 32 * 128
    products = 2 * hidden * (2 * heads + 2 * 4 * 128) + 8 * 3 * 2 * hidden * inner + 2 * heads * 2048
    hessians = 2 * hidden**2 + heads**2 + 8 * (hidden**2 + inner**2)  # half of 2 n d^2 each: they are symmetric
    floor = args.layers * 2048 * args.samples * (products + hessians) / BF16
    for name, samples in (("kernels compiled", rows[: args.batch_size]), ("measured", rows)):
        quantizer = QuantizeModule(QuantizeConfig(batch_size=args.batch_size))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with quantizer.temporarily(model, samples, PassOptions(nsamples=len(samples))) as report:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.1f} s, {seconds / args.layers:.2f} s a block, {report.totals()['modules']} layers")
    few = [module for module in report.quantized if module.tokens < module.shape[1]]
    parts = ", ".join(f"{phase} {value:.1f} s" for phase, value in report.seconds.items())
    print(f"{parts}; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"floor {floor / args.layers:.2f} s a block, {seconds / floor:.1f} times that")
    print(f"{len(few)} layers of experts with fewer tokens than inputs")
    print(f"loss {report.totals()['loss'] / report.totals()['rtn_loss']:.3f} of round-to-nearest's")


if __name__ == "__main__":
    main()
