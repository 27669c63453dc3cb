"""Mutations of a checkpoint's safetensors files: tensors of other values, kinds, shapes and names; headers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from campaigns.damage import NOTHING, Damage
from safetensors.torch import load_file, save_file
from torch import Tensor

_QUANTIZED = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)


def weights(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if file.is_file() and not file.is_symlink()]


def _of_one_file(damage: Callable[[Path, Random], Damage]) -> Callable[[Path, Random], Damage]:
    """The damage to one of a folder's files of weights, if it has any."""

    @functools.wraps(damage)
    def of_folder(folder: Path, rng: Random) -> Damage:
        files = weights(folder)
        return damage(rng.choice(files), rng) if files else NOTHING

    return of_folder


@_of_one_file
def tensor(file: Path, rng: Random) -> Damage:
    """Changes one tensor."""
    state = load_file(file)
    if not state:
        return NOTHING
    # Half of the time one of those that only a few layers or none are left without.
    some = [name for name in sorted(state) if not name.endswith(_QUANTIZED)] if rng.random() < 0.4 else []
    name = rng.choice(some or sorted(state))
    kind = rng.choice(sorted(_KINDS))
    # NaN, and what else must be seen; the others may be right.
    changes = kind in ("random", "one value", "bfloat16") or (
        kind in ("zero", "huge", "negative") and not name.endswith("scales")
    )
    shape = state[name].shape
    with torch.no_grad():
        _KINDS[kind](state, name, rng)
    changes |= kind == "transposed" and state[name].shape == shape
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return Damage(f"{name} {kind}", changes)


def _replace(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], str, Random], None]:
    def apply(state: dict[str, Tensor], name: str, rng: Random) -> None:
        state[name] = change(state[name]).clone()

    return apply


def _one(value: float) -> Callable[[dict[str, Tensor], str, Random], None]:
    def apply(state: dict[str, Tensor], name: str, rng: Random) -> None:
        if state[name].numel() and (state[name].is_floating_point() or value == 77):
            state[name].view(-1)[rng.randrange(state[name].numel())] = value

    return apply


def _drop(state: dict[str, Tensor], name: str, rng: Random) -> None:
    del state[name]


def _drop_all(state: dict[str, Tensor], name: str, rng: Random) -> None:
    for other in [one for one in state if one.rpartition(".")[2] == name.rpartition(".")[2]]:
        del state[other]


def _rename(state: dict[str, Tensor], name: str, rng: Random) -> None:
    module = name.rpartition(".")[0]
    others = [
        "",
        "x",
        name.replace("layers.0", "layers.7"),
        f"{name}.x",
        module,
        "é\0",
        name.upper(),
        f" {name}",
        "a" * 10**4,
    ]
    state[rng.choice(others)] = state.pop(name)


def _extra(state: dict[str, Tensor], name: str, rng: Random) -> None:
    suffixes = (".weight", ".bias", ".g_idx", ".weight_zero_point", ".weight_g_idx", ".qweight", ".weight_packed")
    state.setdefault(name.rpartition(".")[0] + rng.choice(suffixes), torch.randn(rng.choice([0, 3, 64])))


def _random(value: Tensor) -> Tensor:
    return torch.randint(-100, 100, value.shape).to(value.dtype)


_KINDS: dict[str, Callable[[dict[str, Tensor], str, Random], None]] = {
    "missing": _drop,
    "missing in all layers": _drop_all,
    "with NaN": _one(float("nan")),
    "with infinity": _one(float("inf")),
    "one value": _one(77),
    "zero": _replace(torch.zeros_like),
    "negative": _replace(lambda value: value if value.dtype == torch.bool else -value),
    "huge": _replace(lambda value: (value.double() * 1e30).to(value.dtype)),
    "random": _replace(_random),
    "bool": _replace(lambda value: value != 0),
    "int8": _replace(lambda value: value.to(torch.int8)),
    "int64": _replace(lambda value: value.to(torch.int64)),
    "float64": _replace(lambda value: value.double()),
    "float8": _replace(lambda value: value.float().to(torch.float8_e4m3fn)),
    "bfloat16": _replace(lambda value: value.bfloat16()),
    "complex": _replace(lambda value: value.to(torch.complex64)),
    "empty": _replace(lambda value: value.new_empty((0, *value.shape[1:]))),
    "scalar": _replace(lambda value: value.flatten()[:1].reshape(()) if value.numel() else value),
    "transposed": _replace(lambda value: value.T.contiguous() if value.ndim == 2 else value[None]),
    "flat": _replace(lambda value: value.flatten()),
    "half": _replace(lambda value: value[: max(1, len(value) // 2)] if value.ndim else value),
    "twice as long": _replace(lambda value: torch.cat([value, value]) if value.ndim else value),
    "of nine dimensions": _replace(lambda value: value.reshape(1, 1, 1, 1, 1, 1, 1, *value.shape)),
    "renamed": _rename,
    "extra": _extra,
}


@_of_one_file
def header(file: Path, rng: Random) -> Damage:
    """Changes a header as JSON, its length kept right."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        content = json.loads(data[8 : 8 + size])
    except ValueError:
        return NOTHING
    names = [name for name in content if name != "__metadata__"]
    if not names:
        return NOTHING
    name = rng.choice(names)
    entry = content[name]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return NOTHING
    start, end = entry["data_offsets"]
    changes: dict[str, Any] = {
        "shape negative": {"shape": [-1, *entry["shape"]]},
        "shape huge": {"shape": [2**62, 2**62]},
        "shape of floats": {"shape": [1.5]},
        "shape null": {"shape": None},
        "shape of other sizes": {"shape": [*entry["shape"][::-1]]},
        "shape longer": {"shape": [1] * 64 + entry["shape"]},
        "dtype unknown": {"dtype": "F3"},
        "dtype of other size": {"dtype": rng.choice(["F64", "I8", "BOOL", "C64", "U64", "F8_E8M0", "F4"])},
        "dtype of this size": {
            "dtype": {"F16": "BF16", "I32": "F32", "F32": "U32", "BF16": "I16"}.get(entry["dtype"], "F16")
        },
        "dtype a number": {"dtype": 3},
        "offsets beyond": {"data_offsets": [start, end + 10**9]},
        "offsets negative": {"data_offsets": [-1, end]},
        "offsets backwards": {"data_offsets": [end, start]},
        "offsets of another": {"data_offsets": content[rng.choice(names)]["data_offsets"]},
        "offsets three": {"data_offsets": [start, end, end]},
        "more fields": {"extra": [1] * 10},
        "metadata numbers": None,
        "metadata large": None,
        "spaces": None,
    }
    kind = rng.choice(sorted(changes))
    if changes[kind] is not None:
        entry.update(changes[kind])
    if kind.startswith("metadata"):
        content["__metadata__"] = {"x": "y" * 10**6} if kind == "metadata large" else {"x": 3}
    made = json.dumps(content).encode() + (b" " * 80_000 if kind == "spaces" else b"")
    file.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])
    changed = kind in ("offsets of another", "dtype of this size", "shape of other sizes") or file.suffix == ""
    return Damage(f"{file.name} header, {name}: {kind}", changed)


@_of_one_file
def bits(file: Path, rng: Random) -> Damage:
    """Flips bits in a header, in the length before it, or in the data after it."""
    data = bytearray(file.read_bytes())
    if len(data) < 9:
        return NOTHING
    size = min(int.from_bytes(data[:8], "little"), len(data) - 9)
    where = rng.choice(["header", "data", "length"])
    low, high = {"length": (0, 8), "header": (8, 8 + max(size, 1)), "data": (8 + size, len(data))}[where]
    for _ in range(rng.choice([1, 1, 5, 50])):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return Damage(f"{file.name}: bits of its {where}", changes=where != "length")


@_of_one_file
def cut(file: Path, rng: Random) -> Damage:
    """Cuts a file off, or writes on."""
    data = file.read_bytes()
    at = rng.choice([0, 3, 8, 20, rng.randrange(len(data) + 1), max(0, len(data) - 1), len(data) + 100])
    file.write_bytes(data[:at] + bytes(max(0, at - len(data))))
    return Damage(f"{file.name}: {at} bytes of {len(data)}")
