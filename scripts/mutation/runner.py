"""Runs tests in forks of a process that has imported everything but this package."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from mutants import Mutant
from targets import REPOSITORY, Target

_NO_MUTANT = 77  # exit status: it cannot be compiled, or is the same


@dataclass(frozen=True)
class Baseline:
    """A target's tests without a mutant.

    Attributes:
        seconds: All of them, from fork to end.
        durations: Of each test, by its id.
        entered: The names, not dotted, of the target's functions that each test calls in this process.
    """

    seconds: float
    durations: dict[str, float]
    entered: dict[str, set[str]]

    def tests_of(self, where: str, longest: float = float("inf")) -> set[str]:
        """The tests to run for a change of that function: those that call one of its name, and those whose calls
        nobody saw (they may be in another process); all where none calls it, since import runs it then. None that
        takes longer than `longest`, in seconds."""
        name = where.rpartition(".")[2]
        calling = {test for test, functions in self.entered.items() if name in functions}
        unseen = {test for test, functions in self.entered.items() if not functions}
        tests = calling | unseen if calling else set(self.entered)
        return {test for test in tests if self.durations.get(test, 0.0) <= longest}


def baseline(target: Target) -> Baseline:
    """Runs the target's tests twice: the first time to learn which functions each calls, and what they import from
    elsewhere, which is imported here afterwards, so that no mutant's process has to.

    Raises:
        RuntimeError: A test fails.
    """
    entered: dict[str, set[str]] = {}
    for recorder in (_Entered(target.file), _Durations()):
        start = time.perf_counter()
        status, said = _wait(*_fork_with_pipe(lambda recorder=recorder: _record(target, recorder)))
        seconds, found = time.perf_counter() - start, json.loads(said)
        if status != 0:
            raise RuntimeError(f"the tests of {target.name} fail without a mutant:\n{found['output'][-3000:]}")
        for name in found["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        entered = entered or {test: set(functions) for test, functions in found["recorded"].items()}
    gc.collect()
    gc.freeze()  # pytest collects garbage in every process, which need not look at what was here before
    return Baseline(seconds, found["recorded"], entered)


def outcomes(
    target: Target, mutants: Sequence[Mutant], processes: int, before: Baseline, longest: float
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant with "killed", "timeout" or "survived", as they end; what is none is left out.

    Tests that take longer than `longest` seconds are not run.
    """
    limit = 10 + 5 * before.seconds
    waiting, running = deque(mutants), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < processes:
            mutant = waiting.popleft()
            running[_fork(lambda mutant=mutant: _test(target, mutant, before, longest))] = (
                mutant,
                time.monotonic() + limit,
            )
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


def _test(target: Target, mutant: Mutant, before: Baseline, longest: float) -> int:
    source = mutant.source()
    if source is None:
        return _NO_MUTANT
    sys.meta_path.insert(0, _Mutated(target, source))
    chosen = _FastestFirst(before.durations, before.tests_of(mutant.where, longest))
    return _pytest(target, ["-x"], chosen, io.StringIO())


def _pytest(target: Target, options: list[str], plugin: object, out: io.StringIO) -> int:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        arguments = [*target.tests, "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
        return int(pytest.main(arguments, plugins=[plugin]))


class _FastestFirst:
    def __init__(self, durations: dict[str, float], tests: set[str]) -> None:
        self._durations = durations
        self._tests = tests

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self._tests]
        items.sort(key=lambda item: self._durations.get(item.nodeid, 0.0))


class _Durations:
    def __init__(self) -> None:
        self.recorded: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.recorded[report.nodeid] = self.recorded.get(report.nodeid, 0) + report.duration


class _Entered:
    def __init__(self, file: Path) -> None:
        self.recorded: dict[str, list[str]] = {}
        self._file = str(file)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        functions: set[str] = set()

        def see(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code.co_filename == self._file:
                functions.add(frame.f_code.co_name)

        sys.settrace(see)
        threading.settrace(see)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.recorded[item.nodeid] = sorted(functions)


def _record(target: Target, recorder: _Durations | _Entered) -> tuple[int, str]:
    before, out = set(sys.modules), io.StringIO()
    status = _pytest(target, [], recorder, out)
    new = [(name, module) for name, module in sys.modules.items() if name not in before]
    elsewhere = [name for name, module in new if "site-packages" in (getattr(module, "__file__", None) or "")]
    return status, json.dumps({"recorded": recorder.recorded, "modules": elsewhere, "output": out.getvalue()})


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
