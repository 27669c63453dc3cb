"""Mutations of a checkpoint that are cheap to make and dear to read: sparse files, many values, many or hard rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from campaigns.damage import NOTHING, Damage
from campaigns.json_damage import json_files
from campaigns.tensor_damage import weights
from safetensors.torch import load_file, save_file

_HOLE = 64 << 30  # bytes
_BESIDE = (
    "config.json", "quantize_config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "README.md", "quantization_report.json", "report.html", "notes.txt", "chat_template.jinja",
    "data.bin", "adapter_config.json", "sub/notes.txt", "x.yaml",
)  # fmt: skip
_NAME = "model.layers.{}.mlp.experts.{}.down_proj"


def sparse(folder: Path, rng: Random) -> Damage:
    """Makes a file, there or not, 64 GB long, nearly all of it a hole."""
    file = folder / rng.choice([*_BESIDE, *(one.name for one in weights(folder))])
    if file.is_symlink() or file.is_dir():
        return NOTHING
    file.parent.mkdir(exist_ok=True)
    kind = rng.choice(["after what was there", "before it"])
    before = file.read_bytes() if file.is_file() and kind == "after what was there" else b""
    with file.open("wb") as opened:
        opened.write(before)
        opened.truncate(_HOLE)
        if not before:
            opened.seek(_HOLE)
            opened.write(b"{}")
    return Damage(f"{file.name}: a hole {kind}", changes=True)


def values(folder: Path, rng: Random) -> Damage:
    """Adds very many values to a JSON file, where nobody reads them or where somebody does."""
    many = rng.choice([10**5, 10**6, 10**7])
    kinds: dict[str, Callable[[], str]] = {
        "numbers": lambda: f"[{'0,' * (many - 1)}0]",
        "lists": lambda: f"[{'[],' * (many - 1)}[]]",
        "deep lists": lambda: f"[{','.join(['[' * 90 + ']' * 90] * (many // 90))}]",
        "objects": lambda: f"[{'{},' * (many - 1)}{{}}]",
        "deep objects": lambda: "[" + ",".join(['{"":' * 90 + "0" + "}" * 90] * (many // 90)) + "]",
        "keys": lambda: "{" + ",".join(f'"{i}":0' for i in range(many)) + "}",
        "a long text": lambda: json.dumps("x" * (10 * many)),
        "a wide text": lambda: f'"{chr(0x1F600)}{"x" * (10 * many)}"',
        "a long number": lambda: "0." + "1" * many,
        "spaces": lambda: " " * (10 * many) + "0",
        "commas": lambda: f'"{"," * many}"',
    }
    kind, file = rng.choice(sorted(kinds)), rng.choice(json_files(folder))
    field = rng.choice(["x", "id2label", "auto_map", "architectures", "weight_map", "meta", "dynamic", "eos_token_id"])
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("{", f'{{"{field}": {kinds[kind]()},', 1), encoding="utf-8")
    return Damage(f"{file.name} {field} = {many:,} {kind}", changes=True)


def rules(folder: Path, rng: Random) -> Damage:
    """Describes the checkpoint by very many rules, groups or targets, or by few that are hard to match."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    described = content["quantization_config"]
    kind, expressions = rng.choice(list(_EXPRESSIONS.items()))
    many = rng.choice([1, 1000, 20_000, 100_000, 500_000])
    made = expressions(many)
    if described.get("quant_method") == "compressed-tensors":
        group = next(iter(described["config_groups"].values()))
        where = rng.choice(["ignore", "targets", "groups"])
        if where == "ignore":
            described["ignore"] = [f"re:{one}" for one in made]
        elif where == "targets":
            group["targets"] += [f"re:{one}" for one in made]
        else:
            others = {f"x{number}": {**group, "targets": [f"re:{one}"]} for number, one in enumerate(made)}
            described["config_groups"].update(others)
    else:
        where = rng.choice(["", "-:", "+:"])
        described["dynamic"] = {where + one: {} if where == "-:" else {"bits": described["bits"]} for one in made}
        if rng.random() < 0.3:  # as an export of this package tells how it quantized
            described.setdefault("meta", {})["gptq_plugin"] = {"clip_ratios": [1.0]}
    file.write_text(json.dumps(content))
    if rng.random() < 0.5:
        (folder / "quantize_config.json").unlink(missing_ok=True)
    return Damage(f"{len(made):,} {kind} as {where or 'dynamic'}", changes=True)


_EXPRESSIONS: dict[str, Callable[[int], list[str]]] = {
    "names": lambda many: [f"^{re.escape(_NAME.format(i // 100, i % 100))}$" for i in range(many)],
    "names with dots": lambda many: [_NAME.format(i // 100, i % 100) for i in range(many)],
    "beginnings of names": lambda many: [rf"model\.layers\.0\.{'x' * (i % 7)}{i}" for i in range(many)],
    "ends of names": lambda many: [f".*x{i}$" for i in range(many)],
    "nested repetitions": lambda many: [f"(a{i}|b)*(c|d)*.*(e|f)*!" for i in range(min(many, 20_000))],
    "lookaheads in each other": lambda many: [f"{'(?=.*' * 40}{i}{')' * 40}" for i in range(min(many, 2000))],
    "parts": lambda many: [".*" * min(many, 100_000) + "!"],
    "optional letters": lambda many: ["a?" * min(many, 100_000) + "!"],
    "lookaheads": lambda many: ["(?=.*)" * min(many, 40_000)],
    "alternatives": lambda many: [f"({'|'.join(f'a{i}' for i in range(many))})"],
    "any letters": lambda many: ["." * (10 * many)],
    "letters": lambda many: ["x" * (10 * many)],
    "bounded repetitions": lambda many: ["(?:" * 12 + "ab|c" + "){8}" * 12],
    "ranges of all letters": lambda many: ["(?i)" + "[Ā-\U0010ffff]" * min(many, 20_000)],
    "classes": lambda many: [f"[{''.join(map(chr, range(256, 55_000, 2)))}]" * min(many, 3)],
}  # fmt: skip


def header(folder: Path, rng: Random) -> Damage:
    """Lets a header announce much: its own length, tensors, metadata."""
    files = weights(folder)
    if not files:
        return NOTHING
    file = rng.choice(files)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    content: dict[str, Any] = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    kinds: dict[str, Callable[[], Any]] = {
        "a length of 2^63": lambda: 2**63,
        "a length of 10^11": lambda: 10**11,
        "a length of 99,999,999": lambda: 99_999_999,
        "90 MB of spaces": lambda: b" " * (90 << 20),
        "200 MB of spaces": lambda: b" " * (200 << 20),
        "many empty tensors": lambda: {
            f"x{i}": {"dtype": "F16", "shape": [0], "data_offsets": [end, end]} for i in range(300_000)
        },
        "many layers": lambda: {
            f"model.layers.{i}.q_proj.qweight": {"dtype": "I32", "shape": [0, 8], "data_offsets": [end, end]}
            for i in range(100_000)
        },
        "much metadata": lambda: {"__metadata__": {str(i): "x" * 50 for i in range(500_000)}},
        "a tensor of 40 GB": lambda: {
            "x.weight": {"dtype": "F16", "shape": [20 << 20, 1 << 10], "data_offsets": [end, end + (40 << 30)]}
        },
    }
    kind = rng.choice(sorted(kinds))
    change = kinds[kind]()
    if isinstance(change, int):
        file.write_bytes(change.to_bytes(8, "little") + data[8:])
    else:
        made = json.dumps({**content, **change} if isinstance(change, dict) else content).encode()
        made += change if isinstance(change, bytes) else b""
        file.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + size :])
    if kind == "a tensor of 40 GB":
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size + (40 << 30))
    return Damage(f"{file.name}: {kind}", changes=True)


def files(folder: Path, rng: Random) -> Damage:
    """Adds very many files, or folders in each other, or shards."""
    kind = rng.choice(["files", "folders in each other", "shards", "tensors of one byte"])
    if kind == "files":
        for number in range(3000):
            (folder / f"{number}.txt").write_text("x")
    elif kind == "folders in each other":
        below = folder
        for _ in range(rng.choice([10, 400])):
            below = below / "d"
            below.mkdir()
        (below / "x.txt").write_text("x")
    elif kind == "shards":
        return _shards(folder)
    else:
        file = next(iter(weights(folder)), None)
        if file is None:
            return NOTHING
        state = load_file(file)
        save_file({**state, **{f"x{i}": state[min(state)].flatten()[:1].clone() for i in range(20_000)}}, file)
    return Damage(f"many {kind}", changes=True)


def _shards(folder: Path) -> Damage:
    files = weights(folder)
    if len(files) != 1:
        return NOTHING
    state = load_file(files[0])
    index = dict.fromkeys(state, files[0].name)
    for number in range(2000):
        save_file({f"x{number}": state[min(state)].flatten()[:1].clone()}, folder / f"s{number}.safetensors")
        index[f"x{number}"] = f"s{number}.safetensors"
    files[0].rename(folder / "w.safetensors")
    index = {name: "w.safetensors" if file == files[0].name else file for name, file in index.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return Damage("2,000 shards", changes=True)
