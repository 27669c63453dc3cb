"""Hostile `.ckpt` files, and folders of sharded checkpoints.

A case is saved in one of PyTorch's formats, holds something odd or hostile beside or among the weights, and is then,
in some cases, damaged as a file. It must give the weights that were trained, or be refused and leave the network as it
was. Nothing in it may run, and nothing outside its folder may be read or written.

The changes are structural and our own: a pickle or zip archive whose bytes change blindly, as a general fuzzer's do,
hardly ever gets past its parser. Some cases are of that kind.
"""

from __future__ import annotations

import builtins
import dataclasses
import datetime
import enum
import functools
import importlib
import io
import os
import pickle
import pickletools
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import numpy
import torch
from campaigns.campaign import Campaign, Case, Wrong, own_error
from campaigns.examples import randoms
from campaigns.watch import nothing_outside, untouched
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gptq_plugin.apps.lightning_weights import load_lightning_weights, open_lightning_weights

Point = namedtuple("Point", "x y")
State = dict[Any, Any]


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Options:
    depth: int = 3
    path: Path = Path("x")


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self._rest = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._rest

    def __call__(self) -> None:
        raise AssertionError  # pickle asks for something that can be called


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4, bias=False))


def _attack(case: Case, rng: Random) -> None:
    torch.manual_seed(rng.randrange(2**31))
    trained = _network()
    weights = {
        name: torch.randn_like(t) if t.is_floating_point() else t + 3 for name, t in trained.state_dict().items()
    }
    secret = case.folder / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(bytes(4096))
    folder = case.folder / "checkpoint"
    folder.mkdir()
    prefix = rng.choice(["", "model.", "net.inner."])
    state: State = {prefix + name: tensor for name, tensor in weights.items()}
    content: State = {"epoch": 3, "hyper_parameters": {"lr": 1e-3}, "state_dict": state}
    done = [_changed(content, prefix, rng, case.folder) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    try:
        path, saved = _save(content, folder, rng)
    except (Exception, CheckpointException) as error:  # noqa: BLE001  PyTorch cannot write everything
        case.is_of(f"{'; '.join(done)}: cannot be saved ({type(error).__name__})")
        return
    done.append(saved)
    summed = saved not in ("old", "no checksums")
    if len(done) == 1 or rng.random() < 0.3:
        file = rng.choice([file for file in sorted(folder.rglob("*")) if file.is_file()])
        done.append(f"{file.name}: {rng.choice(_BYTES)(file, rng)}")
        state = state if summed else {}  # whose bytes no reader can know to be others
    case.is_of("; ".join(done))
    case.attempt("load", lambda: _load(case.folder, path, weights, state, prefix), _objection)


def _changed(content: State, prefix: str, rng: Random, root: Path) -> str:
    change = rng.choice(_CONTENT)
    try:
        return change(content, prefix, rng, root)
    except Exception as error:  # noqa: BLE001  what an earlier change made impossible
        return f"({change.__name__} was not possible: {type(error).__name__})"


def _objection(error: Exception) -> str:
    return own_error(error) or ("" if "run" in str(error) else "does not name the file")


def _load(root: Path, path: Path, weights: dict[str, Tensor], state: State, prefix: str) -> None:
    """The weights that were stored are in the network afterwards, if they can be known."""
    network = _network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        with untouched(root), nothing_outside(secret=root / "secret"):
            load_lightning_weights(network, open_lightning_weights(path))
    except Wrong:
        raise
    except Exception:
        if path.is_file() and any(
            not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items()
        ):
            raise Wrong("it was refused, and the network has changed") from None
        raise
    for name, tensor in network.state_dict().items() if state else ():
        stored = state.get(prefix + name)
        right = stored if isinstance(stored, Tensor) else weights[name]
        if right.is_floating_point() != tensor.is_floating_point():
            raise Wrong(f"{name} was stored as {right.dtype}, and is taken as {tensor.dtype}")
        if not torch.equal(tensor, right.detach().to(tensor.dtype)):
            raise Wrong(f"{name} is {tensor.flatten()[:3].tolist()}, and was {right.flatten()[:3].tolist()}")


def _save(content: State, folder: Path, rng: Random) -> tuple[Path, str]:
    how = rng.choice(["zip 2", "zip 4", "zip 5", "old", "sharded", "no checksums"])
    path = folder / "run.ckpt"
    plain = (
        all(
            isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
            for value in content["state_dict"].values()
        )
        if isinstance(content.get("state_dict"), dict)
        else False
    )
    if how == "sharded" and plain and all(isinstance(key, str) for key in content["state_dict"]):
        dcp.save({"state_dict": content["state_dict"]}, checkpoint_id=path, no_dist=True)
        return path, how
    torch.serialization.set_crc32_options(how != "no checksums")
    sys.setrecursionlimit(200_000)
    protocol = int(how[-1]) if how.startswith("zip") else 2
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how != "old")
    sys.setrecursionlimit(1000)
    return path, how


# What is in the checkpoint. Each changes the content, and tells what it did.


def _odd_parameters(content: State, prefix: str, rng: Random, root: Path) -> str:
    nested: list[Any] = []
    nested.append(nested)
    many: list[Any] = []
    for _ in range(40):
        many = [many, many]
    kinds: dict[str, Any] = {
        "OmegaConf": OmegaConf.create({"model": {"width": 64, "layers": [1, 2]}, "path": "${model.width}"}),
        "missing resolver": OmegaConf.create({"x": "${oc.env:HOME}"}),
        "paths": [Path("/data/x.txt"), PurePosixPath("y")],
        "partial": functools.partial(torch.optim.AdamW, lr=1e-3),
        "classes": {"a": nn.GELU, "i": nn.init.zeros_, "b": len},
        "own kinds": {"o": Options(), "c": Colour.RED, "p": Point(1, 2)},
        "containers": {"d": defaultdict(list, a=[1]), "c": Counter("aab"), "o": OrderedDict(a=1)},
        "numbers": {"s": numpy.float64(0.5), "a": numpy.arange(3), "c": 1j, "big": 2**4000},
        "others": {"t": datetime.datetime(2026, 1, 2), "s": {1, 2}, "f": frozenset([3]), "b": b"x", "r": range(3)},
        "a module": nn.Linear(2, 2),
        "in itself": nested,
        "doubled forty times": many,
        "a long text": "x" * 10**6,
        "a surrogate": "\udcff",
    }
    kind = rng.choice(sorted(kinds))
    content[rng.choice(["hyper_parameters", "callbacks", "datamodule_hyper_parameters"])] = kinds[kind]
    return f"{kind} as hyperparameters"


def _payload(content: State, prefix: str, rng: Random, root: Path) -> str:
    mark = str(root / "mark")
    code = f"__import__('os').mkdir({mark!r})"
    secret = str(root / "secret" / "key")
    payloads: dict[str, Any] = {
        "os.system": Calls(os.system, f"mkdir {mark}"),
        "os.mkdir": Calls(os.mkdir, mark),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "Popen": Calls(subprocess.Popen, ["mkdir", mark]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "call of a call": Calls(Calls(getattr, Calls(__import__, "os"), "mkdir"), mark),
        "partial": Calls(Calls(functools.partial, os.mkdir, mark)),
        "map": Calls(list, Calls(map, os.mkdir, [mark])),
        "reduce": Calls(functools.reduce, os.mkdir, [mark, 0o777]),
        "state": Calls(OrderedDict, state={"x": Calls(os.mkdir, mark)}),
        "state of a stand-in": Calls(Options, state={"__setstate__": Calls(eval, code)}),
        "a pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, mark))),
        "torch.load": Calls(torch.load, secret),
        "torch.jit": Calls(torch.jit.load, secret),
        "torch.hub": Calls(torch.hub.load, "owner/name", "model"),
        "open": Calls(open, secret),
        "open to write": Calls(open, mark, "w"),
        "numpy.load": Calls(numpy.load, secret),
        "socket": Calls(socket.create_connection, ("127.0.0.1", 9)),
        "import": Calls(importlib.import_module, "antigravity"),
        "exit": Calls(sys.exit, 0),
        "abort": Calls(os._exit, 0),
        "a large bytearray": Calls(bytearray, 10**11),
        "a large storage": Calls(torch.UntypedStorage, 10**12),
        "a storage of a file": Calls(torch.UntypedStorage.from_file, secret, False, 4096),
        "a tensor without storage": Calls(
            torch._utils._rebuild_tensor_v2, None, 0, (2, 2), (2, 1), False, OrderedDict()
        ),
        "a tensor beyond its storage": Calls(
            torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 10**6, (2, 2), (10**9, 1), False, OrderedDict()
        ),
        "a parameter of a text": Calls(torch._utils._rebuild_parameter, "x", True, OrderedDict()),
        "a set of lists": Calls(set, [[1], [2]]),
        "a device": Calls(torch.device, "cuda:99"),
        "a size": Calls(torch.Size, ["x", -1]),
    }
    kind = rng.choice(sorted(payloads))
    place = rng.choice(["hyper_parameters", "state_dict", "a weight", "another weight", "a list"])
    if place == "a weight":
        content["state_dict"][rng.choice(sorted(content["state_dict"], key=str))] = payloads[kind]
    elif place == "another weight":
        content["state_dict"]["other"] = payloads[kind]
    elif place == "a list":
        content["loops"] = [{"a": (payloads[kind],)}]
    else:
        content[place] = payloads[kind]
    if place == "state_dict":
        content["state_dict"] = (
            Calls(OrderedDict, state={"x": payloads[kind]}) if rng.random() < 0.5 else payloads[kind]
        )
    return f"{kind} as {place}"


def _odd_key(content: State, prefix: str, rng: Random, root: Path) -> str:
    if not isinstance(content["state_dict"], dict):
        return "nothing"
    key = rng.choice(
        [0, None, b"x", (1, 2), "", 1.5, True, "x" * 10**5, "\udcff", f"{prefix}0.weight\0", f"..{prefix}"]
    )
    value = rng.choice([torch.ones(2), None, "text", 3, torch.ones(6, 8)])
    content["state_dict"][key] = value
    return f"{str(key)[:20]!r} among the weights"


def _odd_weight(content: State, prefix: str, rng: Random, root: Path) -> str:
    state = content["state_dict"]
    if not isinstance(state, dict):
        return "nothing"
    name = rng.choice(
        [name for name in state if isinstance(state[name], Tensor) and state[name].layout is torch.strided] or [None]
    )
    if name is None:
        return "nothing"
    tensor = state[name].detach()
    kinds: dict[str, Callable[[], Any]] = {
        "sparse": tensor.to_sparse,
        "rows": lambda: tensor.to_sparse_csr() if tensor.ndim == 2 else tensor,
        "meta": lambda: tensor.to("meta"),
        "float16": tensor.half,
        "bfloat16": tensor.bfloat16,
        "float64": tensor.double,
        "float8": lambda: tensor.float().to(torch.float8_e4m3fn),
        "int8": lambda: tensor.to(torch.int8),
        "bool": lambda: tensor != 0,
        "complex": lambda: tensor.to(torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        "parameter": lambda: nn.Parameter(tensor.float()),
        "expanded": lambda: tensor.flatten()[0].float().expand(tensor.shape),
        "strided": lambda: torch.cat([tensor, tensor])[::2].reshape(tensor.shape) if tensor.ndim else tensor,
        "another shape": lambda: tensor[None],
        "shorter": lambda: tensor.flatten()[:-1],
        "nested": lambda: torch.nested.nested_tensor([tensor.flatten().float(), tensor.flatten()[:1].float()]),
        "negative view": lambda: torch._neg_view(tensor),
        "a list": tensor.tolist,
        "an array": tensor.numpy,
        "None": lambda: None,
        "missing": lambda: None,
        "empty": lambda: torch.empty(0),
        "huge in shape": lambda: torch.ones(1).expand(2**40),
    }
    kind = rng.choice(sorted(kinds))
    state[name] = kinds[kind]()
    if kind == "missing":
        del state[name]
    return f"{name} {kind}"


def _whole(content: State, prefix: str, rng: Random, root: Path) -> str:
    deep: Any = 1
    for _ in range(20_000):
        deep = [deep]
    odd = {
        "no state_dict": lambda: content.pop("state_dict"),
        "a list for a state_dict": lambda: content.update(state_dict=[1]),
        "an empty state_dict": lambda: content.update(state_dict={}),
        "a state_dict in a state_dict": lambda: content.update(state_dict={"state_dict": content["state_dict"]}),
        "20,000 deep": lambda: content.update(hyper_parameters=deep),
        "twice the weights": lambda: content["state_dict"].update(
            {f"ema.{k}": v for k, v in content["state_dict"].items()}
        ),
    }
    kind = rng.choice(sorted(odd))
    if isinstance(content.get("state_dict"), dict):
        odd[kind]()
    content.setdefault("state_dict", None)
    return kind


# What is done to its file.


def _cut(file: Path, rng: Random) -> str:
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 1, 30, rng.randrange(len(data) + 1), max(0, len(data) - 1)])])
    return "cut"


def _flip(file: Path, rng: Random) -> str:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 40])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return "bits"


def _opcodes(file: Path, rng: Random) -> str:
    """Changes the pickle: opcodes, and short arguments."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 5])):
            at = rng.randrange(len(changed))
            code = rng.choice(pickletools.opcodes).code.encode("latin1")
            insert = rng.choice(
                [code, b"cos\nsystem\n", b"X\x04\x00\x00\x00exec", b"\x85R", b"Q", b"j\xff\xff\xff\xff"]
            )
            changed[at : at + rng.choice([0, 1])] = insert
        return bytes(changed)

    return _with_record(file, "data.pkl", change) or _flip(file, rng)


def _storage_path(file: Path, rng: Random) -> str:
    """Has the pickle name another storage."""
    key = rng.choice([b"../../secret/key", b"/etc/hostname", b"9", b"", b"../data.pkl", b"0\x00", b"data.pkl"])
    old, new = b"X\x01\x00\x00\x000", b"X" + len(key).to_bytes(4, "little") + key
    return _with_record(file, "data.pkl", lambda data: data.replace(old, new)) or _flip(file, rng)


def _storage_kind(file: Path, rng: Random) -> str:
    """Has the pickle tell another dtype or number of elements."""
    kinds = [b"HalfStorage", b"DoubleStorage", b"IntStorage", b"LongStorage", b"BoolStorage", b"ComplexFloatStorage"]

    def change(data: bytes) -> bytes:
        if rng.random() < 0.5:
            return data.replace(b"FloatStorage", rng.choice(kinds))
        return data.replace(
            b"K0", rng.choice([b"K\xff", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff"])
        )

    return _with_record(file, "data.pkl", change) or _flip(file, rng)


def _records(file: Path, rng: Random) -> str:
    """Changes the archive: records are missing, shorter, longer, there twice, in another place, or compressed."""
    if not zipfile.is_zipfile(file):
        return _cut(file, rng)
    with zipfile.ZipFile(file) as archive:
        records = [
            (info.filename, archive.open(info).read()) for info in archive.infolist() if info.CRC or not info.file_size
        ]
    if not records:
        return _cut(file, rng)
    at = rng.randrange(len(records))
    name, data = records[at]
    kind = rng.choice(["missing", "short", "long", "twice", "moved", "all compressed", "a bomb", "empty", "a program"])
    if kind == "missing":
        del records[at]
    elif kind == "short":
        records[at] = (name, data[: len(data) // 2])
    elif kind == "long":
        records[at] = (name, data * 3)
    elif kind == "twice":
        records.append((name, bytes(len(data))))
    elif kind == "moved":
        records[at] = (f"{name.partition('/')[0]}/../{name.partition('/')[2]}", data)
    elif kind == "a bomb":
        records[at] = (name, bytes(2**30))
    elif kind == "empty":
        records = []
    elif kind == "a program":
        records.append((f"{name.partition('/')[0]}/constants.pkl", pickle.dumps(())))
    method = zipfile.ZIP_DEFLATED if kind in ("all compressed", "a bomb") else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for record in records:
            archive.writestr(*record)
    return f"record {name} {kind}"


def _other_file(file: Path, rng: Random) -> str:
    file.unlink()
    kind = rng.choice(["a pipe", "a folder", "a loop", "nothing", "a pickle", "text", "zeros", "a tar archive"])
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a loop":
        file.symlink_to(file.name)
    elif kind == "a pickle":
        file.write_bytes(pickle.dumps(Calls(os.system, "mkdir mark")))
    elif kind == "a tar archive":
        with tarfile.open(file, "w") as archive:
            for name in ("pickle", "storages", "tensors"):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(link)
    elif kind == "text":
        file.write_text("not a checkpoint\n" * 100)
    elif kind == "zeros":
        file.write_bytes(bytes(10_000))
    return kind


def _with_record(file: Path, wanted: str, change: Callable[[bytes], bytes]) -> str:
    """Rewrites the archive with one record changed, its checksum right; empty if the file is no archive."""
    if not zipfile.is_zipfile(file):
        if file.name == ".metadata":
            file.write_bytes(change(file.read_bytes()))
            return "changed as a pickle"
        return ""
    try:
        with zipfile.ZipFile(file) as archive:
            records = [(info.filename, archive.open(info).read()) for info in archive.infolist()]
    except zipfile.BadZipFile:  # no checksums
        return ""
    with zipfile.ZipFile(io.BytesIO(), "w") as archive:
        for name, data in records:
            archive.writestr(name, change(data) if name.rpartition("/")[2] == wanted else data)
        archive.close()
        file.write_bytes(archive.fp.getvalue() if archive.fp else b"")  # type: ignore[attr-defined]
    return f"changed {wanted}"


_CONTENT = (_odd_parameters, _payload, _payload, _odd_key, _odd_weight, _odd_weight, _whole)
_BYTES = (_cut, _flip, _flip, _opcodes, _storage_path, _storage_kind, _records, _records, _other_file)

CAMPAIGN = Campaign(
    about="`.ckpt` files and sharded folders: `gptq-quantize ckpt=`", cases=1000, few=30, given=randoms, attack=_attack
)
