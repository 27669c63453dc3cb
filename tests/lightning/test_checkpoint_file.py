"""A checkpoint's tensors are read whatever lies beside them, and nothing in the file runs."""

from __future__ import annotations

import builtins
import dataclasses
import datetime
import enum
import functools
import os
import pickle
import subprocess
import tarfile
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from gptq_plugin.errors import CheckpointError
from gptq_plugin.lightning.checkpoint_file import read_checkpoint
from gptq_plugin.lightning.unpickler import StandIn

Point = namedtuple("Point", "x y")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Options:
    depth: int = 3
    path: Path = Path("x")


class Listing(list):
    """A list with a state, a class of its own, and items."""

    def __init__(self, *items):
        super().__init__(items)
        self.note = "kept"


class Table(dict):
    pass


HYPERPARAMETERS = {
    "OmegaConf": OmegaConf.create({"model": {"width": 64, "layers": [1, 2]}, "path": "${model.width}"}),
    "paths": [Path("/data/x.txt"), PurePosixPath("y")],
    "partial": functools.partial(torch.optim.AdamW, lr=1e-3),
    "a class and a function": {"activation": nn.GELU, "initial": nn.init.zeros_, "builtin": len},
    "own kinds": {"options": Options(), "colour": Colour.RED, "point": Point(1, 2)},
    "containers": {"d": defaultdict(list, a=[1]), "l": Listing(1, 2), "t": Table(a=1), "c": Counter("aab")},
    "numbers": {"scalar": numpy.float64(0.5), "array": numpy.arange(3), "complex": 1j, "big": 2**70},
    "others": {"when": datetime.datetime(2026, 1, 2), "s": {1, 2}, "f": frozenset([3]), "b": b"x", "r": range(3)},
    "a module": nn.Linear(2, 2),
}


def state_dict():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return model.state_dict()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", HYPERPARAMETERS)
def test_weights_are_read_beside_hyperparameters_of_every_kind(kind, protocol, tmp_path):
    state = state_dict()
    content = {
        "epoch": 3,
        "hyper_parameters": HYPERPARAMETERS[kind],
        "state_dict": state,
        "last": HYPERPARAMETERS[kind],
    }
    torch.save(content, tmp_path / "run.ckpt", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "run.ckpt")
    assert read["epoch"] == 3 and list(read["state_dict"]) == list(state)
    assert all(torch.equal(read["state_dict"][name], value) for name, value in state.items())
    assert read["state_dict"]._metadata == state._metadata  # versions, for load_state_dict


def test_tensors_of_every_kind_are_read_exactly(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    state = {
        "view": shared[1:, ::2], "shared": shared, "parameter": nn.Parameter(torch.ones(2)), "empty": torch.empty(0),
        "half": torch.ones(2).half(), "bfloat16": torch.ones(3).bfloat16(), "bool": torch.tensor([True, False]),
        "float8": torch.ones(2).to(torch.float8_e4m3fn), "uint16": torch.tensor([7], dtype=torch.uint16),
        "sparse": torch.eye(3).to_sparse(), "scalar": torch.tensor(3),
    }  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    read = read_checkpoint(tmp_path / "run.ckpt")["state_dict"]
    for name, value in state.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name].to_dense().float(), value.to_dense().float())


def test_a_file_in_pytorchs_old_format_is_read(tmp_path):
    state = state_dict()
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path / "old.ckpt")["state_dict"]
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_what_was_not_built_tells_its_name_where_it_is_used(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": Options()}, tmp_path / "run.ckpt")
    found = read_checkpoint(tmp_path / "run.ckpt")["hyper_parameters"]
    assert isinstance(found, StandIn)
    with pytest.raises(AttributeError, match="Options of the checkpoint was not built, so it has no 'depth'"):
        _ = found.depth


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments, state=None, items=None, entries=None):
        self.rest = (function, arguments, state, items, entries)

    def __reduce__(self):
        function, arguments, state, items, entries = self.rest
        return (function, arguments, state, None if items is None else iter(items),
                None if entries is None else iter(entries))  # fmt: skip

    def __call__(self):
        raise AssertionError  # pickle asks for something that can be called


def hostile(mark):
    """Payloads that would make the folder `mark`."""
    code = f"__import__('os').mkdir({str(mark)!r})"
    return {
        "os.system": Calls(os.system, f"mkdir {mark}"),
        "os.mkdir": Calls(os.mkdir, str(mark)),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "Popen": Calls(subprocess.Popen, ["mkdir", str(mark)]),
        "getattr": Calls(getattr, Calls(__import__, "os"), "mkdir"),
        "nested": Calls(Calls(getattr, Calls(__import__, "os"), "mkdir"), str(mark)),
        "partial": Calls(Calls(functools.partial, os.mkdir, str(mark))),
        "map": Calls(list, Calls(map, os.mkdir, [str(mark)])),
        "state": Calls(OrderedDict, state=Calls(os.mkdir, str(mark))),
        "state of a stand-in": Calls(Options, state={"__setstate__": Calls(eval, code), "x": Calls(eval, code)}),
        "items": Calls(Listing, items=[Calls(os.mkdir, str(mark))]),
        "entries": Calls(Table, entries=[("a", Calls(os.mkdir, str(mark)))]),
        "nested entries": Calls(Table, entries=[("a", Calls(Table, entries=[("b", Calls(eval, code))]))]),
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(mark)))),
        "torch.hub": Calls(torch.hub.load, "owner/name", "model"),
        "compiled": Calls(torch.jit.load, str(mark)),
        "a rebuild function": Calls(torch._utils._rebuild_parameter, torch.ones(1), True, Calls(eval, code)),
    }


@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_file_runs_nothing_and_its_weights_are_read(name, protocol, tmp_path):
    mark = tmp_path / "ran"
    torch.save({"a": hostile(mark)[name], "state_dict": {"w": torch.ones(2)}}, tmp_path / "x", pickle_protocol=protocol)
    assert not mark.exists()
    assert torch.equal(read_checkpoint(tmp_path / "x")["state_dict"]["w"], torch.ones(2))
    assert not mark.exists()


def test_the_payloads_do_run_where_a_file_is_trusted(tmp_path):
    mark = tmp_path / "ran"
    for name in ("os.system", "eval", "nested", "entries", "nested entries"):
        torch.save({"a": hostile(mark)[name]}, tmp_path / "x")
        torch.load(tmp_path / "x", weights_only=False)
        assert mark.exists(), name
        mark.rmdir()


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [("torch.nn.parameter Parameter", "__torch_function__"), ("torch._utils _rebuild_tensor_v2", "__defaults__")],
)
def test_a_hostile_file_cannot_change_the_functions_it_may_use(owner, attribute, tmp_path):
    # BUILD on a class or function, which pickle answers with setattr
    module, name = owner.split()
    program = f"c{module}\n{name}\n(N(S'{attribute}'\nNdtb.".encode()
    target = getattr(__import__(module, fromlist=[name]), name)
    before = getattr(target, attribute)
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/version", "3\n")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert getattr(target, attribute) == before


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    torch.save({"weights": 1}, tmp_path / "none.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": Options()}, tmp_path / "own.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    for name in ("none", "list", "own"):
        with pytest.raises(CheckpointError, match=rf"{name}\.ckpt has no state_dict"):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(CheckpointError, match=r"broken\.ckpt cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "broken.ckpt")
    with pytest.raises(CheckpointError, match="it is a TorchScript program"):
        read_checkpoint(tmp_path / "program.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    torch.save({"state_dict": {3: torch.ones(2)}}, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"run\.ckpt: state_dict has 3 among its names"):
        read_checkpoint(tmp_path / "run.ckpt")


def _with_a_bit_flipped(path, record):
    """Flips a bit of a record where it lies."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith(record)))
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("record", ["data/0", "data.pkl"])
def test_bytes_that_are_not_those_that_were_written_are_seen(record, tmp_path):
    torch.save({"state_dict": {"w": torch.randn(40), "view": torch.randn(9)[2:5]}}, tmp_path / "run.ckpt")
    read_checkpoint(tmp_path / "run.ckpt")
    _with_a_bit_flipped(tmp_path / "run.ckpt", record)
    with pytest.raises(CheckpointError, match=r"run\.ckpt (is damaged|cannot be read)"):
        read_checkpoint(tmp_path / "run.ckpt")


def test_a_file_that_was_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"w": torch.arange(4.0)}}, tmp_path / "run.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "run.ckpt")["state_dict"]["w"].tolist() == [0, 1, 2, 3]


def test_a_pickle_that_has_less_of_a_storage_than_the_file_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(48)}}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "run.ckpt", "w") as run:
        for name in whole.namelist():
            run.writestr(name, whole.read(name).replace(b"FloatStorage", b"HalfStorage"))
    with pytest.raises(CheckpointError, match=r"run\.ckpt (is damaged|cannot be read)"):
        read_checkpoint(tmp_path / "run.ckpt")


def test_a_tar_archive_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "run.ckpt", "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(b"x")
            archive.add(tmp_path / name, name)
    with pytest.raises(CheckpointError, match="it is a tar archive"):
        read_checkpoint(tmp_path / "run.ckpt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_old_file_is_read_as_a_new_one_is_and_runs_nothing(protocol, tmp_path):
    mark, state = tmp_path / "ran", state_dict()
    for payload in (Options(), hostile(mark)["os.system"], hostile(mark)["nested entries"], HYPERPARAMETERS["paths"]):
        content = {"hyper_parameters": payload, "state_dict": state}
        torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        read = read_checkpoint(tmp_path / "x")["state_dict"]
        assert all(torch.equal(read[name], value) for name, value in state.items()) and not mark.exists()


def rewritten(path, changed, compression=zipfile.ZIP_STORED):
    """A checkpoint of three tensors with changed records; a changed record may be None, which leaves it out."""
    torch.save({"state_dict": {name: torch.ones(16) for name in "abc"}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            content = changed(name.rpartition("/")[2], content)
            if content is not None:
                archive.writestr(name, content)
    return path


def program(*steps):
    return lambda name, content: b"\x80\x04" + b"".join(steps) + b"." if name == "data.pkl" else content


def twice(times):
    """A tuple that holds a tuple twice, and so on."""
    return b"K\x01" + b"2\x86" * times


SMALL_FILES_OF_MUCH = {
    "compressed": (lambda name, content: content + bytes(2**20), "it is compressed"),
    "a key of 2^60 parts": (program(b"}", twice(60), b"K\x01s"), "a tuple of more than 1,000,000 parts"),
    "a name of 2^30 parts": (program(b"}\x8c\nstate_dict}", twice(30), b"K\x01ss"), "a tuple of more than"),
    "a set of 2^60 parts": (program(b"\x8f(", twice(60), b"\x90"), "a tuple of more than 1,000,000 parts"),
    "a frozenset": (program(b"cbuiltins\nfrozenset\n(](", twice(60), b"etR"), "a tuple of more than 1,000,000 parts"),
    "32 GB of bytes": (program(b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x08\x85R"), "makes bytes of a int"),
    "32 GB of storage": (program(b"ctorch.storage\nUntypedStorage\n\x8a\x05\0\0\0\0\x08\x85R"), "takes no arguments"),
    "storage made anew": (program(b"ctorch.storage\nUntypedStorage\n\x8a\x05\0\0\0\0\x08\x85\x81"), "no arguments"),
    "a size of a tensor": (program(b"ctorch\nSize\nctorch\nfloat32\n\x85R"), "makes a container of a dtype"),
    "a storage beyond its record": (
        lambda name, content: content.replace(b"K\x10t", b"J\xff\xff\xff\x7ft"),
        "numbers in storage 0, whose size is another",
    ),
    "a record that is cut": (lambda name, content: content[:8] if name == "0" else content, "whose size is another"),
    "2,000 classes": (program(*(b"c%d\nx\n0" % n for n in range(2000)), b"N"), "more than 1,000 classes"),
    "something else than a storage": (
        lambda name, content: content.replace(b"X\x07\0\0\0storage", b"X\x07\0\0\0modules"),
        "not to a storage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL_FILES_OF_MUCH)
def test_a_small_file_takes_neither_much_time_nor_much_memory(kind, tmp_path):
    changed, words = SMALL_FILES_OF_MUCH[kind]
    compression = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(rewritten(tmp_path / "x.ckpt", changed, compression))


def test_an_archive_whose_records_lie_in_one_another_is_refused(tmp_path):
    path = rewritten(tmp_path / "x.ckpt", lambda name, content: content)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"N.")
    with pytest.raises(CheckpointError, match="have one name, or lie in one another"):
        read_checkpoint(path)


def test_a_tuple_may_be_large_and_may_be_used_often(tmp_path):
    whole = tuple((n, str(n)) for n in range(1000))
    torch.save({"state_dict": {}, "kept": [whole] * 5000, whole: 1}, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read["kept"][-1] == whole and read[whole] == 1


def test_a_file_with_holes_in_place_of_weights_is_refused_at_once(tmp_path):
    path = tmp_path / "holes.ckpt"
    torch.save({"state_dict": state_dict()}, path)
    with path.open("r+b") as file:
        file.truncate(1 << 36)
    began = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"holes\.ckpt is a sparse file, of which less than half was ever written"
    ):
        read_checkpoint(path)
    assert time.monotonic() - began < 5
