"""Runs cases, each in a fork of this process with limits of time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaigns.campaign import FAULT, Campaign, Case, Outcome


@dataclass
class Ended:
    """A case that has ended.

    Attributes:
        number: Its place among the cases of its seed, from 0.
        what: Its description.
        outcomes: Of its attempts.
    """

    number: int
    what: str = ""
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def faults(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind == FAULT]


def run(campaign: Campaign, cases: Iterator[tuple[int, Any]], processes: int, folder: Path) -> Iterator[Ended]:
    """The cases, as they end; each has a folder of its own in `folder`."""
    running: dict[int, _Running] = {}
    more = True
    try:
        while more or running:
            while more and len(running) < processes:
                case = next(cases, None)
                more = case is not None
                if case is not None:
                    one = _Running(campaign, *case, folder)
                    running[one.pipe] = one
            left = min((one.deadline for one in running.values()), default=0) - time.monotonic()
            for pipe in select.select(list(running), [], [], max(0, left))[0] if running else ():
                running[pipe].read()
            for one in [one for one in running.values() if one.is_over()]:
                del running[one.pipe]
                yield one.end()
    finally:
        for one in running.values():
            one.end()


class _Running:
    def __init__(self, campaign: Campaign, number: int, given: Any, folder: Path) -> None:
        self._campaign = campaign
        self._ended = Ended(number)
        self._folder = folder / str(number)
        self._folder.mkdir()
        self._text = b""
        self._attempt = ""
        self._closed = self._finished = False
        self.pipe, theirs = os.pipe()
        self._child = os.fork()
        if not self._child:
            try:
                os.close(self.pipe)
                _child(campaign, given, self._folder, theirs)
            except BaseException:  # noqa: BLE001  this process ends here
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        os.close(theirs)
        self._wait_longer()

    def read(self) -> None:
        data = os.read(self.pipe, 2**16)
        self._closed = not data
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            kind, value = json.loads(line)
            if kind == "what":
                self._ended.what = value
            elif kind == "attempt":
                self._attempt = value
            elif kind == "outcome":
                self._attempt = ""
                self._ended.outcomes.append(Outcome(*value))
            elif kind == "end":
                self._finished = True
            self._wait_longer()

    def is_over(self) -> bool:
        return self._closed or time.monotonic() > self.deadline

    def end(self) -> Ended:
        """Kills the process and all of its session, and tells what it had not told."""
        late = not self._closed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        os.close(self.pipe)
        if not self._finished:
            output = self._folder / "output"
            told = output.read_text(errors="replace") if output.is_file() else ""
            told = told[max(0, told.rfind("Timeout (")) :][:2000] if late else told[-2000:]
            ended = f"ended with {code}" if code else "ended before the case did"
            why = f"took more than {self._campaign.seconds:g} s" if late else f"its process {ended}"
            self._ended.outcomes.append(Outcome(self._attempt or "between", FAULT, f"{why}: {told}"))
        shutil.rmtree(self._folder, ignore_errors=True)
        return self._ended

    def _wait_longer(self) -> None:
        self.deadline = time.monotonic() + self._campaign.seconds


def _child(campaign: Campaign, given: Any, folder: Path, pipe: int) -> None:
    """In the fork: runs the case, and ends the process with 0."""
    os.setsid()
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(sys.__stderr__)
    # Where the case hangs, one second before it is killed.
    late = max(1, campaign.seconds - 1)

    def tell(kind: str, value: Any) -> None:
        faulthandler.dump_traceback_later(late, file=sys.__stderr__)
        data = (json.dumps((kind, value)) + "\n").encode()
        while data:
            data = data[os.write(pipe, data) :]

    if campaign.memory is not None:
        most = _address_space() + campaign.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    place = folder / "case"
    place.mkdir()
    os.chdir(place)
    campaign.attack(Case(place, tell), given)
    tell("end", None)
    os._exit(0)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
