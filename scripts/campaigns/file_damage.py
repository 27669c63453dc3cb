"""Mutations of a checkpoint's folder: shards and their index, links, pipes, files of other kinds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from campaigns.damage import NOTHING, Damage
from campaigns.tensor_damage import weights
from safetensors.torch import load_file, save_file

_MERGED = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
_CARDS = {
    "empty lines": lambda: "\n" * 10**6,
    "lines": lambda: "\n".join(map(str, range(10**5))),
    "merged keys": lambda: _of_metadata("a0: &a0 {k: v}", *_MERGED),
    "deep": lambda: _of_metadata(f"a: {'[' * 10**5}"),
    "deep blocks": lambda: _of_metadata(*(f"{' ' * depth}a:" for depth in range(500))),
    "odd keys": lambda: _of_metadata("1: 2", "self: 3", "eval_results: [4]", "model-index: 5"),
    "a long line": lambda: _of_metadata("license: " + "x" * 10**6),
    "no end": lambda: "---\n" * 10**5,
}
INDEX = "model.safetensors.index.json"


def shards(folder: Path, rng: Random) -> Damage:
    """Divides the weights into two files, with an index that is right or not."""
    files = weights(folder)
    if len(files) != 1 or (folder / INDEX).exists():
        return _index(folder, rng)
    state = load_file(files[0])
    if len(state) < 4:
        return NOTHING
    names = sorted(state)
    files[0].unlink()
    one, two = {name: state[name] for name in names[::2]}, {name: state[name] for name in names[1::2]}
    index = {**dict.fromkeys(one, "model-1.safetensors"), **dict.fromkeys(two, "model-2.safetensors")}
    kind = rng.choice(["right", "twice", "twice unlisted", "a third file"])
    if kind.startswith("twice"):
        two[names[0]] = one[names[0]] * 0
        if kind == "twice unlisted":
            del index[names[0]]
    if kind == "a third file":
        save_file({names[0]: one[names[0]] * 0}, folder / "model-3.safetensors")
    save_file(one, folder / "model-1.safetensors")
    save_file(two, folder / "model-2.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return Damage(f"shards {kind}") if rng.random() < 0.5 else _index(folder, rng)


def _index(folder: Path, rng: Random) -> Damage:
    """Changes the index."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_text())
        index = content["weight_map"]
        name = rng.choice(sorted(index))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return NOTHING
    others: dict[str, Any] = {
        "outside": "../x.safetensors",
        "absolute": "/etc/passwd",
        "a number": 3,
        "missing": "model-9.safetensors",
        "long": "x" * 3000,
        "the index": INDEX,
        "with zeros": "model\0.safetensors",
        "a folder": ".",
        "empty": "",
        "the other": next((other for other in index.values() if other != index[name]), "x"),
    }
    kind = rng.choice([*sorted(others), "left out", "a tensor more", "a list", "no map", "a total"])
    if kind in others:
        index[name] = others[kind]
    elif kind == "left out":
        del index[name]
    elif kind == "a tensor more":
        index[f"{name}.x"] = index[name]
    elif kind == "a list":
        content["weight_map"] = list(index)
    elif kind == "no map":
        del content["weight_map"]
    elif kind == "a total":
        content["metadata"] = [1]
    file.write_text(json.dumps(content))
    return Damage(f"index, {name[:60]} {kind}")


def special(folder: Path, rng: Random) -> Damage:
    """Puts something that is no plain file in the place of a file, or beside them."""
    names = ["config.json", "quantize_config.json", "generation_config.json", INDEX, "tokenizer.json", "sub", "x.py"]
    name = rng.choice([*names, *(file.name for file in weights(folder)), "x.safetensors", "report.html", "README.md"])
    path = folder / name
    before = path.read_bytes() if path.is_file() else None
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    kind = rng.choice(["pipe", "loop", "dangling", "folder", "parent", "passwd", "etc", "device", "a link inside"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "a link inside":
        (folder / "blob").write_bytes(before or b"{}")
        path.symlink_to("blob")
    else:
        path.symlink_to({"loop": name, "dangling": "no", "parent": "..", "passwd": "/etc/passwd", "etc": "/etc"}[kind])
    return Damage(f"{name}: {kind}")


def secret(folder: Path, rng: Random) -> Damage:
    """Links to a file, or a folder, that nobody may publish."""
    target = folder.parent / "secret"
    name = rng.choice(["merges.txt", "sub/merges.txt", "vocab", "model.py", "a folder"])
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if os.path.lexists(path):
        return NOTHING
    path.symlink_to(target if name == "a folder" else target / "key")
    return Damage(f"{name}: a link to a secret")


def names(folder: Path, rng: Random) -> Damage:
    """Adds files of odd names, and code."""
    kind = rng.choice(["not UTF-8", "long", "code", "a second file of weights", "pickled weights", "hidden", "spaces"])
    if kind == "not UTF-8":
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).write_text("x")
    elif kind == "long":
        (folder / ("x" * 250)).write_text("x")
    elif kind == "code":
        (folder / "modeling_x.py").write_text("import os\nos.mkdir('mark')\n")
        file = folder / "config.json"
        try:
            content = json.loads(file.read_text())
            content["auto_map"] = {"AutoModelForCausalLM": f"modeling_x.{rng.choice(['Own', 'LlamaForCausalLM'])}"}
            content["architectures"] = rng.choice([content["architectures"], ["Own"]])
        except (OSError, ValueError, KeyError, TypeError):
            return NOTHING
        file.write_text(json.dumps(content))
    elif kind == "a second file of weights" and weights(folder):
        shutil.copy(weights(folder)[0], folder / "other.safetensors")
    elif kind == "pickled weights":
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'mkdir mark'\ntR.")
    else:
        (folder / ".hidden dir").mkdir(exist_ok=True)
        (folder / ".hidden dir" / " a b ").write_text("x")
    return Damage(f"files: {kind}")


def card(folder: Path, rng: Random) -> Damage:
    """Writes another card, with metadata that take long to parse or cannot be used."""
    kind, file = rng.choice(sorted(_CARDS)), folder / "README.md"
    if os.path.lexists(file) and not file.is_file():
        return NOTHING
    file.unlink(missing_ok=True)
    file.write_text(_CARDS[kind]())
    return Damage(f"README.md: {kind}")


def _of_metadata(*lines: str) -> str:
    return "\n".join(["---", *lines, "license: mit", "---", "# A model"])
