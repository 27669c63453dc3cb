"""Finds the norms of a model, by what they compute: `find_norms`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS, _FACTOR, _TOLERANCE = 4, 8.0, 0.02  # epsilons and bfloat16 move outputs by less


def find_norms(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of norms, each once, by name: of modules whose outputs do not change with the size of inputs.

    Such a module has no children and parameters of one dimension alone, one of them called ``weight``; LayerNorm and
    every model's own RMSNorm are some. Others, such as a BatchNorm in evaluation mode, are none. They are called on
    random rows; hooks on them are not.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        is_vectors = all(one.dim() == 1 for one in parameters.values())
        if weight is not None and is_vectors and not any(module.children()) and _normalizes(module):
            found |= {f"{name}.{key}".lstrip("."): one for key, one in parameters.items() if one.is_floating_point()}
    distinct: dict[int, str] = {}
    for name, parameter in found.items():
        distinct.setdefault(id(parameter), name)
    return {name: found[name] for name in distinct.values()}


@torch.no_grad()
def _normalizes(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(_ROWS, len(weight), generator=generator, device="cpu").to(weight)
    try:
        small, large = (module.forward(rows * factor) for factor in (1.0, _FACTOR))
    except Exception:  # noqa: BLE001  a module of any kind, called with what it may not take
        return False
    if not (isinstance(small, Tensor) and isinstance(large, Tensor) and small.shape == large.shape == rows.shape):
        return False
    small, large = small.float(), large.float()
    moves = (small - small[:1]).abs().max() > 0  # a constant does not change either
    near = (large - small).abs().max() <= _TOLERANCE * small.abs().max()
    return bool(moves & near & torch.isfinite(small).all())
