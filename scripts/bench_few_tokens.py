"""Measures the loss of experts that see few tokens: errors on tokens held out from calibration, as a fraction of
round-to-nearest's, with the expert's own tokens alone and with `expert_hessians`.

    python scripts/bench_few_tokens.py      # about five minutes on two cores

pycode-29m (../shared) has no experts, so the tokens of one cluster of a layer's inputs stand for those of an expert: 80
rows of 512 tokens, k-means with 8 clusters, the sixth largest, one half for calibration and one for evaluation. d is
the layer's number of inputs. `up_proj` reads tokens, `down_proj` reads what it computes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from bench_accuracy import MODEL, TEXTS, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq_plugin import QuantizeConfig
from gptq_plugin.gptq.grid import round_to_nearest
from gptq_plugin.gptq.solver import solve
from gptq_plugin.walk.expert_hessians import ExpertHessians
from gptq_plugin.walk.hessian import Hessian

LAYERS, BITS, SHARES = (2, 5), (4, 3), (1 / 16, 1 / 4, 1, 4)
CPU = torch.device("cpu")


@torch.no_grad()
def inputs() -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(args[0].flatten(0, 1))

    weights = {}
    for layer in LAYERS:
        for part in ("up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.{part}"
            module = model.get_submodule(name)
            module.register_forward_pre_hook(partial(keep, name))
            weights[f"{name}.weight"] = module.weight.detach()
    for batch in windows(TEXTS / "calib.jsonl", 80).split(8):
        model(input_ids=batch, use_cache=False)
    return {**{name: torch.cat(parts) for name, parts in seen.items()}, **weights}


def cluster(x: Tensor) -> Tensor:
    """Indices of the tokens in the sixth largest of 8 clusters by direction, shuffled."""
    generator = torch.Generator().manual_seed(0)
    x = x / x.norm(dim=1, keepdim=True)
    centres = x[torch.randperm(len(x), generator=generator)[:8]]
    for _ in range(10):
        nearest = (x @ centres.T).argmax(1)
        centres = torch.stack([x[nearest == number].mean(0) for number in range(8)])
        centres = centres / centres.norm(dim=1, keepdim=True)
    chosen = int(torch.bincount(nearest, minlength=8).argsort(descending=True)[5])
    numbers = (nearest == chosen).nonzero().flatten()
    return numbers[torch.randperm(len(numbers), generator=generator)]


def summed(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], CPU)
    hessian.add(x)
    return hessian


def main() -> None:
    data = inputs()
    print(f"{'layer':28s} bits  d     n     alone  weighted or damped")
    for layer in LAYERS:
        mine = cluster(data[f"model.layers.{layer}.mlp.up_proj"])
        for part in ("up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.{part}"
            x, weight = data[name], data[f"{name}.weight"]
            width = weight.shape[1]
            calibrated, judged = x[mine[: len(mine) // 2]], x[mine[len(mine) // 2 :]]
            for bits in BITS:
                config = QuantizeConfig(bits=bits)

                def error(quantized: Tensor, weight: Tensor = weight, judged: Tensor = judged) -> float:
                    return float((judged @ (weight - quantized).T).square().sum())

                nearest = error(round_to_nearest(weight, config).dequantize(torch.float32))
                for share in SHARES:
                    tokens = int(width * share)
                    if tokens > len(calibrated):
                        continue
                    own = summed(calibrated[:tokens])
                    alone = error(solve(weight, own.mean(), config).weight.dequantize(torch.float32)) / nearest
                    experts = ExpertHessians(CPU)
                    experts.entered("experts", x)
                    evidence = experts.weighted("experts", part == "up_proj", own)
                    ours = replace(config, damp_percent=max(config.damp_percent, evidence.damp_percent))
                    better = error(solve(weight, evidence.mean, ours).weight.dequantize(torch.float32)) / nearest
                    print(f"{name:28s} {bits:4d}  {width:4d}  {tokens:4d}  {alone:.3f}  {better:.3f}", flush=True)


if __name__ == "__main__":
    main()
