"""Times blocks of experts of Qwen3-30B-A3B's shape (128 experts, 8 per token) on one GPU.

    python scripts/bench_moe.py                             # two blocks; 128 samples of 2048 tokens, 4 bits, group 128
    python scripts/bench_moe.py --layers 1 --samples 32
    python scripts/bench_moe.py --shape mixtral --layers 1  # 8 experts of Mixtral-8x7B's shape, 2 per token
    python scripts/bench_moe.py --layers 48 --streamed --export /tmp/out  # a whole model, from the CPU's memory
    python scripts/bench_moe.py --layers 1 --batch-size 64 --parts  # also where the time goes
    python scripts/bench_moe.py --layers 1 --one-by-one     # without calls of all experts at once
    python scripts/bench_moe.py --layers 1 --method best    # the default is gptq
    python scripts/bench_moe.py --shape tiny --device cpu   # sees that the script runs

Weights and tokens are random; random routers spread tokens more evenly than trained ones. The floor is the time of the
block's products for all tokens, its forward and each layer's Hessian, at 680e12 flops per second in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.quantize import batch_runs
from gptq_plugin.quantize.options import PassOptions

BF16 = 680e12
SHAPES = {  # hidden, inner, heads, key-value heads, width of a head, experts, per token, positions of a sample
    "qwen3": (2048, 768, 32, 4, 128, 128, 8, 2048),
    "mixtral": (4096, 14336, 32, 8, 128, 8, 2, 2048),
    "tiny": (128, 128, 2, 1, 64, 8, 2, 64),
}
PARTS = {
    "calibration.positions": ("Positions.rows",),
    "calibration.routed_tokens": ("row_hashes",),
    "quantize.grouped_evidence": ("GroupedEvidence.add",),
    "quantize.float_tokens": ("FloatTokens.of_rows", "FloatTokens._enter"),
    "walk.each_drift": ("EachDrift.add", "EachDrift.take"),
    "walk.hessian": ("add_each", "Hessian.mean"),
    "walk.expert_hessians": ("ExpertHessians.weighted",),
    "walk.ranges": ("_include_experts", "_include"),
    "model.experts_call": ("_grouped", "_one_by_one"),
    "gptq.solve_each": ("factorize", "beside", "each_target", "each_loss", "solve_each"),
    "gptq.refine": ("Arranged.of", "regridded", "refitted", "descended"),
    "gptq.solver": ("factorize", "_beside"),
    "gptq.recursion": ("Recursion.__init__", "Recursion.visit"),
    "quantize.experts_pass": ("packed_layers", "dequantize", "ExpertsPass.quantize"),
    "layers.qlinear": ("QuantLinear.from_quantized",),
    "memory.weights": ("Weights.quantize",),
    "memory.finished_layers": ("FinishedLayers.add",),
    "quantize.outcome": ("Outcome.add_experts", "Outcome.add", "Outcome.modules", "Outcome.report"),
    "quantize.batch_runs": (
        "BatchRuns.find_groups",
        "BatchRuns.disturbance",
        "BatchRuns.observe_positions",
        "BatchRuns.check_swap",
    ),
    "quantize.one_pass": ("OnePass._quantize", "OnePass.run"),
}


def build(shape: str, layers: int, device: str, home: str) -> Any:
    hidden, inner, heads, kv_heads, width, experts, chosen, _ = SHAPES[shape]
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        num_experts=experts,
        num_experts_per_tok=chosen,
    )
    torch.manual_seed(0)
    if home == device:
        with torch.device(device):
            return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    model.to_empty(device=home)

    def fill(parameter: torch.Tensor) -> None:  # with values that are made where that is fast
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        with torch.no_grad():
            parameter.copy_(values.normal_(std=0.02) if parameter.dim() > 1 else values.fill_(1))

    with ThreadPoolExecutor(8) as pool:  # the host's memory is touched for the first time
        list(pool.map(fill, model.parameters()))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # whose frequencies are not parameters
    return model


def floor_of(shape: str, tokens: int) -> float:
    """Seconds of a block."""
    hidden, inner, heads, kv_heads, width, _, chosen, length = SHAPES[shape]
    attention = heads * width
    products = 2 * hidden * (2 * attention + 2 * kv_heads * width) + chosen * 3 * 2 * hidden * inner
    products += 2 * attention * length
    hessians = 2 * hidden**2 + attention**2 + chosen * (hidden**2 + inner**2)  # half of 2 n d^2 each: symmetric
    return tokens * (products + hessians) / BF16


class Parts:
    """Seconds in functions of the package, each without those it calls, with a wait for the device around each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner: list[float] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measures while the context is open."""
        with contextlib.ExitStack() as stack:
            for module, path in ((module, path) for module, paths in PARTS.items() for path in paths):
                owner: Any = importlib.import_module(f"gptq_plugin.{module}")
                *classes, name = path.split(".")
                for one in classes:
                    owner = getattr(owner, one)
                plain = owner.__dict__[name]
                timed = self._timed(f"{module}.{path}", getattr(plain, "__func__", plain))
                setattr(owner, name, classmethod(timed) if isinstance(plain, classmethod) else timed)
                stack.callback(setattr, owner, name, plain)
            yield

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            _wait()
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return plain(*args, **kwargs)
            finally:
                _wait()
                took = time.perf_counter() - started
                self.seconds[name] += took - self._inner.pop()
                self.calls[name] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed

    def show(self) -> None:
        """Prints a line for each part that was called."""
        for name in sorted(self.seconds, key=lambda name: -self.seconds[name]):
            print(f"    {name:60} {1e3 * self.seconds[name]:9.1f} ms {self.calls[name]:6} calls", flush=True)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, help="QuantizeConfig's default without")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--one-by-one", action="store_true", help="call one expert after the other")
    parser.add_argument("--parts", action="store_true", help="measure once more, with a wait after each part")
    parser.add_argument("--streamed", action="store_true", help="the model is in the CPU's memory")
    parser.add_argument("--export", help="also export to this folder while quantizing, and verify the export")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    if args.one_by_one:
        batch_runs.grouped_experts = lambda *_: {}
    started = time.perf_counter()
    model = build(args.shape, args.layers, args.device, "cpu" if args.streamed else args.device)
    print(f"made in {time.perf_counter() - started:.1f} s")
    length, generator = SHAPES[args.shape][-1], torch.Generator().manual_seed(0)
    rows = list(torch.randint(0, 2048, (args.samples, length), generator=generator))
    group_size = 128 if args.shape != "tiny" else 32
    config = QuantizeConfig(method=args.method, batch_size=args.batch_size, group_size=group_size)
    if args.export is None:
        timed(model, rows[: args.batch_size or 8], config, args, "kernels compiled")
    report, seconds = timed(model, rows, config, args, "measured")
    few = [module for module in report.quantized if module.tokens < module.shape[1]]
    phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in report.seconds.items())
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{phases}; up to {report.batch_size} samples in a forward; peak {peak:.1f} GiB, of the host {host:.1f} GiB")
    floor = args.layers * floor_of(args.shape, length * args.samples)
    print(f"floor {floor / args.layers:.3f} s a block, {seconds / floor:.1f} times that")
    if args.parts:
        parts = Parts()
        with parts.measured():
            timed(model, rows, config, args, "with waits")
        parts.show()
    print(f"{len(few)} layers of experts with fewer tokens than inputs")
    print(f"loss {report.totals()['loss'] / report.totals()['rtn_loss']:.3f} of round-to-nearest's")


def timed(
    model: Any, rows: list[Any], config: QuantizeConfig, args: argparse.Namespace, name: str
) -> tuple[Any, float]:
    """Quantizes, and prints how long that took; returns the report and the seconds."""
    quantizer = QuantizeModule(config)
    if args.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    if args.export is None:
        with quantizer.temporarily(model, rows, PassOptions(nsamples=len(rows), device=args.device)) as report:
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    else:
        report = quantizer.quantize(
            model, rows, nsamples=len(rows), device=args.device, export_dir=args.export, overwrite=True
        )
        seconds = time.perf_counter() - started
    layers = report.totals()["modules"]
    print(f"{name}: {seconds:.2f} s, {seconds / args.layers:.3f} s a block, {layers} layers", flush=True)
    return report, seconds


if __name__ == "__main__":
    main()
