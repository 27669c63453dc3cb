"""Runs tests in forks of a process that has imported everything but this package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from mutants import Mutant
from targets import REPOSITORY, Target

_NO_MUTANT = 77  # exit status: it cannot be compiled, or is the same


@dataclass(frozen=True)
class Baseline:
    """A target's tests without a mutant.

    Attributes:
        seconds: All of them, from fork to end.
        durations: Of each test, by its id.
    """

    seconds: float
    durations: dict[str, float]


def baseline(target: Target) -> Baseline:
    """Runs the target's tests twice: the first time to learn what they import from elsewhere, which is imported here
    afterwards, so that no mutant's process has to.

    Raises:
        RuntimeError: A test fails.
    """
    for _ in range(2):
        start = time.perf_counter()
        status, said = _wait(*_fork_with_pipe(lambda: _record(target)))
        seconds, found = time.perf_counter() - start, json.loads(said)
        if status != 0:
            raise RuntimeError(f"the tests of {target.name} fail without a mutant:\n{found['output'][-3000:]}")
        for name in found["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return Baseline(seconds, found["durations"])


def outcomes(
    target: Target, mutants: Sequence[Mutant], processes: int, before: Baseline
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with "killed", "timeout" or "survived", as they end; what is none is left out."""
    limit = 10 + 5 * before.seconds
    waiting, running = deque(mutants), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < processes:
            mutant = waiting.popleft()
            running[_fork(lambda mutant=mutant: _test(target, mutant, before))] = mutant, time.monotonic() + limit
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            mutant, _ = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code != _NO_MUTANT:
                yield mutant, "survived" if code == 0 else "timeout" if code == -signal.SIGKILL else "killed"
            continue
        for pid, (_, end) in running.items():
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)


def _test(target: Target, mutant: Mutant, before: Baseline) -> int:
    source = mutant.source()
    if source is None:
        return _NO_MUTANT
    sys.meta_path.insert(0, _Mutated(target, source))
    return _pytest(target, ["-x"], _FastestFirst(before.durations), io.StringIO())


def _pytest(target: Target, options: list[str], plugin: object, out: io.StringIO) -> int:
    import pytest

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        arguments = [*target.tests, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
        return int(pytest.main(arguments, plugins=[plugin]))


class _FastestFirst:
    def __init__(self, durations: dict[str, float]) -> None:
        self._durations = durations

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self._durations.get(item.nodeid, 0.0))


class _Durations:
    def __init__(self) -> None:
        self.durations: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0) + report.duration


def _record(target: Target) -> tuple[int, str]:
    recorder, before, out = _Durations(), set(sys.modules), io.StringIO()
    status = _pytest(target, [], recorder, out)
    new = [(name, module) for name, module in sys.modules.items() if name not in before]
    elsewhere = [name for name, module in new if "site-packages" in (getattr(module, "__file__", None) or "")]
    return status, json.dumps({"durations": recorder.durations, "modules": elsewhere, "output": out.getvalue()})


class _Mutated(importlib.abc.MetaPathFinder):
    """Finds the target's module, with the mutant's source."""

    def __init__(self, target: Target, source: str) -> None:
        self._target = target
        self._source = source

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> Any:
        if name != self._target.name:
            return None
        return importlib.util.spec_from_file_location(
            name, self._target.file, loader=_Loader(name, str(self._target.file), self._source)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec")


def _fork(run: Callable[[], int]) -> int:
    """Runs it in a process and session of its own, which ends with its return value; returns the process's id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(REPOSITORY)
        code = run()
    finally:
        os._exit(code)


def _fork_with_pipe(run: Callable[[], tuple[int, str]]) -> tuple[int, int]:
    read, write = os.pipe()

    def tell() -> int:
        code, said = run()
        with os.fdopen(write, "w") as out:
            out.write(said)
        return code

    pid = _fork(tell)
    os.close(write)
    return pid, read


def _wait(pid: int, read: int) -> tuple[int, str]:
    with os.fdopen(read) as answer:
        said = answer.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
