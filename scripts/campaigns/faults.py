"""Whatever fails, wherever: every float weight, hook and flag, checkpoints and the earlier export are as before.

Functions of this package, and functions of PyTorch and the system that it calls, raise at a call of theirs, or are
interrupted there; disks are full or cannot be written to; memory ends; warnings are errors; there is no home. The error
that users see is ours, or the one that happened. Where a fault is dealt with, the result is right.

A fault in the middle of what puts things back is not tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
from campaigns.campaign import Campaign, Case, Wrong, own_error
from campaigns.examples import randoms
from campaigns.kills import nothing_hidden, whole
from campaigns.scenes import SCENES, Convert, Scene
from campaigns.trainings import QUANTIZER, llama, samples

import gptq_plugin
from gptq_plugin import QuantizeModule
from gptq_plugin.export.export_dir import check_export_dir

_PACKAGE = str(Path(gptq_plugin.__file__).parent)
_PUTTING_BACK = {"undo", "restore", "put_back", "remove", "abort", "__exit__", "put", "fuse", "leave", "close",
                 "release", "reclaim", "_remove_earlier"}  # fmt: skip


class PowerCut(Exception):
    """What is raised, and no code knows."""


class Calls:
    """Counts calls of this package's functions, and of built-in functions by this package, and fails at one.

    Args:
        at: Name of the function and number of its call; None only counts.
        error: What is raised there.
    """

    def __init__(self, at: tuple[str, int] | None = None, error: BaseException | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._at, self._error, self._lock = at, error, threading.Lock()
        self.has_failed = False

    def __enter__(self) -> Calls:
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _see(self, frame: FrameType, event: str, function: Any) -> None:
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        where = frame.f_code.co_filename[len(_PACKAGE) + 1 : -3].replace("/", ".")
        name = f"{where}.{frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name}"
        if event == "c_call":
            name += f" -> {function.__qualname__}"
        if _is_putting_back(frame):
            return
        with self._lock:
            fails = self._at == (name, self.counts[name]) and not self.has_failed
            self.has_failed |= fails
            self.counts[name] += 1
        if fails:
            assert self._error is not None
            raise self._error


def _is_putting_back(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in _PUTTING_BACK:
            return True
        frame = frame.f_back
    return False


Fault = AbstractContextManager[Any]


def _raises(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """A function fails at one of its calls, which a run without faults counts first."""
    with Calls() as calls:
        _made(scene, folder / "counted", rng.random() < 0.5).run()
    _forget()
    kind = " -> " if rng.random() < 0.4 else ""
    name = rng.choice(sorted(name for name in calls.counts if (" -> " in name) == bool(kind)))
    number = rng.randrange(calls.counts[name])
    error = rng.choice([PowerCut("power cut")] * 6 + [KeyboardInterrupt(), SystemExit(3), OSError(errno.EIO, "broken")])
    what = f"{type(error).__name__} in call {number + 1} of {calls.counts[name]} of {name}"
    return what, Calls((name, number), error), type(error)


@contextlib.contextmanager
def _limited(kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _small_files(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """No file may be longer."""
    limit = rng.choice([0, 100, 4096, 20_000, 60_000, 100_000])
    return f"files of at most {limit} bytes", _limited(resource.RLIMIT_FSIZE, limit), OSError


def _little_memory(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """Whatever is allocated beyond some megabytes fails."""
    more = rng.randrange(64) << 20
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return f"{more >> 20} MiB of address space", _limited(resource.RLIMIT_AS, now + more), MemoryError


def _full_disk(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """The case's folder lies on a small disk."""
    room = rng.choice([64, 128, 256, 300, 350, 400, 500, 700, 1000])
    return f"a disk of {room} KiB", _mounted(folder, "-t", "tmpfs", "-o", f"size={room}k", "tmpfs"), OSError


@contextlib.contextmanager
def _mounted(folder: Path, *how: str) -> Iterator[None]:
    """Mounts something there for this process alone; what lies in the folder stays visible where it fits."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS of <sched.h>
        yield  # not permitted
        return
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", *how, str(folder)], check=True)
    yield


def _read_only(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """The case's folder becomes read-only, from the beginning or at a rename, a flush or a new folder."""
    moment, number = rng.choice(["os.rename", "os.fsync", "os.mkdir", "the beginning"]), 1 + rng.randrange(6)
    what = moment if moment == "the beginning" else f"call {number} of {moment}"
    return f"a folder that is read-only from {what}", _read_only_from(folder, moment, number), OSError


@contextlib.contextmanager
def _read_only_from(folder: Path, moment: str, number: int) -> Iterator[None]:
    if ctypes.CDLL(None).unshare(0x00020000):
        yield  # not permitted
        return
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)

    def close(*_: Any) -> None:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

    if moment == "the beginning":
        close()
        yield
        return
    own, calls = getattr(os, moment[3:]), itertools.count(1)

    def closing(*args: Any, **kwargs: Any) -> Any:
        if (str(folder) in str(args[0]) or moment == "os.fsync") and next(calls) == number:
            setattr(os, moment[3:], own)
            close()
        return own(*args, **kwargs)

    setattr(os, moment[3:], closing)
    try:
        yield
    finally:
        setattr(os, moment[3:], own)


def _system_call(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """A function of the system fails at one of its first calls."""
    name = rng.choice(["rename", "fsync", "mkdir", "unlink", "rmdir", "chmod", "stat", "listdir", "scandir"])
    number, code = rng.randrange(8), rng.choice([errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
    return f"{errno.errorcode[code]} of call {number + 1} of os.{name}", _failing(name, number, code), OSError


@contextlib.contextmanager
def _failing(name: str, number: int, code: int) -> Iterator[None]:
    own, calls = getattr(os, name), Counter[str]()

    def fails(*args: Any, **kwargs: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        if frame is not None and not _is_putting_back(frame):
            calls[name] += 1
            if calls[name] == number + 1:
                raise OSError(code, os.strerror(code))
        return own(*args, **kwargs)

    setattr(os, name, fails)
    try:
        yield
    finally:
        setattr(os, name, own)


def _surroundings(scene: str, folder: Path, rng: Random) -> tuple[str, Fault, type[BaseException]]:
    """Something about the process is odd."""
    kinds: dict[str, Callable[[], Fault]] = {
        "warnings are errors": _warnings_as_errors,
        "a home that is not there": lambda: _environment(HOME="/nonexistent", XDG_CACHE_HOME="/nonexistent/cache"),
        "a home that cannot be written to": lambda: _environment(HOME="/proc", XDG_CACHE_HOME="/proc"),
        "no home": lambda: _environment(HOME=None, XDG_CACHE_HOME=None, HF_HOME=None),
        "ASCII for output": lambda: _output(errors="strict", encoding="ascii"),
        "an output that is full": lambda: _output(path="/dev/full"),
    }
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind](), OSError if "full" in kind else Warning


@contextlib.contextmanager
def _warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _output(path: str = os.devnull, **how: Any) -> Iterator[None]:
    out, err = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = open(path, "w", buffering=1, **how)  # noqa: SIM115  flushing may fail
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


FAULTS = {
    _raises: 12,
    _small_files: 1,
    _little_memory: 2,
    _full_disk: 2,
    _read_only: 1,
    _system_call: 3,
    _surroundings: 1,
}


def _made(scene: str, folder: Path, has_earlier: bool) -> Scene:
    folder.mkdir(exist_ok=True)
    if has_earlier:
        shutil.copytree(Convert.source, folder / "export")
    return SCENES[scene](folder, Convert.source if has_earlier else None)


def _forget() -> None:
    gc.collect()


def _given(seed: int, count: int) -> Iterator[tuple[str, Random]]:
    return zip(itertools.cycle(SCENES), randoms(seed, count), strict=False)


def _attack(case: Case, given: tuple[str, Random]) -> None:
    logging.disable()
    scene, rng = given
    kind = rng.choice([kind for kind, often in FAULTS.items() for _ in range(often)])
    folder = case.folder / "run"
    folder.mkdir()
    what, fault, error = kind(scene, case.folder, rng)
    has_earlier = rng.random() < 0.5
    case.is_of(f"{scene}: {what}")
    run = _in_fork if kind is _little_memory else _run
    case.attempt(kind.__name__.strip("_"), lambda: run(scene, folder, has_earlier, fault, error), lambda error: "")


def _run(scene: str, folder: Path, has_earlier: bool, fault: Fault, error: type[BaseException]) -> None:
    one = None
    try:
        with fault:
            one = _made(scene, folder, has_earlier)
            one.run()
    except BaseException as raised:
        objection = _objection(raised, error)
        if one is not None and not (_was_told(raised) and _is_done(one)):
            one.check_is_back()
        if objection:
            raise Wrong(objection) from raised
        if isinstance(raised, Exception):
            raise
        return
    if one is not None:
        one.check_done()


def _in_fork(scene: str, folder: Path, has_earlier: bool, fault: Fault, error: type[BaseException]) -> None:
    """The same where C code may end the process: then the folder is judged."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        told = "ok"
        try:
            _run(scene, folder, has_earlier, fault, error)
        except Wrong as wrong:
            told = f"wrong: {wrong}"
        except BaseException as refused:  # noqa: BLE001  it is told
            told = f"refused: {refused}"
        os.write(write, told.encode()[:4000])
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    kind, _, text = os.fdopen(read).read().partition(": ")
    if kind == "wrong":
        raise Wrong(text)
    if kind == "refused":
        raise MemoryError(text)
    if not kind:
        check_export_dir(folder / "export", overwrite=True)
        if has_earlier or (folder / "export").exists():
            whole(folder / "export", Convert.source)
        nothing_hidden(folder)


def _was_told(raised: BaseException) -> bool:
    """True if the result was being told to users: then all had been done."""
    return any(frame.name in ("end", "tell_result") for frame in traceback.extract_tb(raised.__traceback__))


def _is_done(scene: Scene) -> bool:
    try:
        scene.check_done()
    except Wrong:
        return False
    return True


def _objection(raised: BaseException, injected: type[BaseException]) -> str:
    chain: list[BaseException] = []
    one: BaseException | None = raised
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    if any(isinstance(error, injected) for error in chain) or (isinstance(raised, Exception) and not own_error(raised)):
        return ""
    if issubclass(injected, MemoryError) and any(word in str(raised) for word in ("memory", "allocate", "thread")):
        return ""
    # safetensors raises an error of its own where the Trainer's checkpoint finds no room.
    no_room = issubclass(injected, OSError) and os.strerror(errno.ENOSPC) in str(raised)
    if no_room and not any(f.filename.startswith(_PACKAGE) for f in traceback.extract_tb(raised.__traceback__)):
        return ""
    return f"neither ours nor what happened: {type(raised).__name__}: {raised}"


def _prepare(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    quantizer, model = QuantizeModule(**{**QUANTIZER, "bits": 8}), llama()
    quantizer.quantize(model, [one["input_ids"] for one in samples()[:16]])
    quantizer.export(model, folder / "export")
    logging.disable(logging.NOTSET)
    Convert.source = folder / "export"


CAMPAIGN = Campaign(
    about="functions that fail or are interrupted, disks, memory, and odd surroundings",
    cases=400,
    few=3,  # the next of seed 0 takes six times as long as these
    given=_given,
    attack=_attack,
    prepare=_prepare,
    seconds=120,
    memory=None,
)
