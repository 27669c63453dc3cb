"""Trainings that are killed, terminated or interrupted: in training, calibration, solving or export.

Before it an earlier export lies in the folder. Afterwards every checkpoint that was complete is as it was; the folder
holds the earlier export or the new one, whole, or, where files are moved one by one, no checkpoint, and then one of the
two as soon as the next run checks the folder. All processes have ended. The next run, which goes on from a checkpoint
in half of the cases, leaves its export and nothing hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from campaigns.campaign import Campaign, Case, Wrong
from campaigns.examples import randoms
from campaigns.offspring import adopt, offspring
from campaigns.trainings import QUANTIZER, Started, Suicide, Training, digests, llama, samples

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.checkpoint.files import read_json
from gptq_plugin.export.export_dir import check_export_dir, files_in

STEPS = {"training": 6, "calibration": 9, "solve": 8, "export": 7}  # as many as a training tells of
PAUSES = {"training": 0.1, "calibration": 0.05, "solve": 0.02, "export": 0.15}  # seconds that the longest take
MOVES = 16  # "export" steps of a folder whose files are moved one by one
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
SECONDS = 30  # all ranks have ended


def _prepare(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    model, quantizer = llama(), QuantizeModule(**{**QUANTIZER, "bits": 8})
    quantizer.quantize(model, [one["input_ids"] for one in samples()[:16]])
    quantizer.export(model, folder / "export")
    Kill.earlier = folder / "export"
    logging.disable(logging.NOTSET)


class Kill:
    """One training, and how it is to end: sooner after its step with every attempt."""

    earlier = Path()

    def __init__(self, step: str, rng: Random, folder: Path, attempt: int) -> None:
        trainer, ranks = rng.choice(["lightning", "transformers"]), rng.choice([1, 1, 2])
        self.training = Training(trainer, ranks, folder, inside=rng.random() < 0.3)
        self.step = step
        self.number = rng.randrange(MOVES if self.training.inside and self.step == "export" else STEPS[self.step])
        self.signal = rng.choice(SIGNALS)
        everyone = self.signal != signal.SIGKILL  # as launchers and terminals send it
        self.victims = set(range(ranks)) if everyone or rng.random() < 0.2 else {rng.randrange(ranks)}
        self.pause = rng.random() * PAUSES[self.step] / 2**attempt
        self.by_itself = self.victims == {0} and rng.random() < 0.5
        self.saved: dict[str, dict[str, str]] = {}
        self.reached = "nothing"

    def __str__(self) -> str:
        how = "at it" if self.by_itself else f"{1000 * self.pause:.0f} ms later"
        where = ", inside the folder" if self.training.inside else ""
        return (
            f"{self.signal.name} of rank {sorted(self.victims)} of {self.training.ranks}, {self.training.trainer}"
            f"{where}, {self.step} {self.number}, {how}"
        )

    def hits(self, output: Path) -> bool:
        """Runs the training and ends it; returns False if it had ended by itself."""
        suicide = Suicide(self.step, self.number, self.signal) if self.by_itself else None
        run, seen, hit = Started(self.training, output, suicide), 0, None
        for what, *rest in run.told():
            if what == "saved":
                self.saved[rest[0]] = rest[1]
            elif what != "raised":
                self.reached = what
            seen += what == self.step
            if what == self.step and seen == self.number + 1:
                hit = time.monotonic()
                if not self.by_itself:
                    time.sleep(self.pause)
                    hit = hit if self._end(run) else None
        ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in run.ranks]
        if hit is not None and time.monotonic() - hit > SECONDS:
            raise Wrong(f"the ranks ended after {time.monotonic() - hit:.0f} s, with {ends}")
        return hit is not None

    def _end(self, run: Started) -> bool:
        """Sends the signal; returns whether a victim lived."""
        victims = [process for process, rank in run.ranks.items() if rank in self.victims]
        living = [process for process in victims if not _has_ended(process)]
        for process in living:
            os.kill(process, self.signal)
        return bool(living)

    def judge(self) -> None:
        """Of what the kill left."""
        left = offspring()
        if left:
            raise Wrong(f"processes are left: {left}")
        for path, before in self.saved.items():
            changed = [name for name, own in before.items() if digests(Path(path)).get(name) != own]
            if changed:
                raise Wrong(f"{changed} of {path} have changed")
        folder, export = self.training.folder, self.training.folder / "export"
        strange = {one.name for one in folder.iterdir() if not is_hidden(one)} - {"export", "checkpoints", "output"}
        if strange:
            raise Wrong(f"left behind: {sorted(strange)}")
        if not self.training.inside or (export / "quantize_config.json").exists():
            whole(export, self.earlier)
        elif (export / "config.json").exists():
            load_quantized(export)
        check_export_dir(export, overwrite=True)
        whole(export, self.earlier)
        nothing_hidden(folder)

    def next_run(self, resume: bool) -> None:
        """A run that nothing ends."""
        checkpoint = Path(max(self.saved, key=lambda path: (len(path), path))) if resume and self.saved else None
        training = dataclasses.replace(self.training, ranks=1, resume=checkpoint)
        run = Started(training, training.folder / "output")
        raised = [what for what in run.told() if what[0] == "raised"]
        (code,) = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in run.ranks]
        if code:
            raise Wrong(f"the next run ended with {code}: {raised}")
        if digests(training.folder / "export") == digests(self.earlier):
            raise Wrong("the next run left the earlier export")
        whole(training.folder / "export", self.earlier)
        nothing_hidden(training.folder)


def whole(export: Path, earlier: Path) -> None:
    """Raises `Wrong` if the folder holds neither the earlier export, unchanged, nor a whole other one."""
    if digests(export) == digests(earlier):
        return
    try:
        files = read_json(export / "quantize_config.json")["meta"]["gptq_plugin"]["files"]
        if sorted(files) != sorted(files_in(export)):
            raise Wrong(f"{sorted(files_in(export))} are there, and {sorted(files)} are described")
        load_quantized(export)
        bits = read_json(export / "quantize_config.json")["bits"]
    except (OSError, ValueError, KeyError) as error:
        raise Wrong(f"the export is not whole: {type(error).__name__}: {error}") from error
    if bits != QuantizeModule(**QUANTIZER).config.bits:
        raise Wrong("the earlier export has changed")


def nothing_hidden(folder: Path) -> None:
    places = [place for place in (folder, folder / "export") if place.is_dir()]
    hidden = [one.name for place in places for one in place.iterdir() if is_hidden(one)]
    if hidden:
        raise Wrong(f"hidden folders are left: {hidden}")


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _given(seed: int, count: int) -> Iterator[tuple[str, Random]]:
    return zip(itertools.cycle(STEPS), randoms(seed, count), strict=False)


def _attack(case: Case, given: tuple[str, Random]) -> None:
    step, rng = given
    adopt()
    for number in range(5):
        folder = case.folder / str(number)
        (folder / "output").mkdir(parents=True)
        shutil.copytree(Kill.earlier, folder / "export")
        kill = Kill(step, rng, folder, number)
        case.is_of(str(kill))
        if kill.hits(folder / "output"):
            case.attempt(f"kill in {kill.reached}", kill.judge, _any)
            case.attempt("next run", lambda: kill.next_run(resume=rng.random() < 0.5), _any)  # noqa: B023
            return
    case.attempt("kill", _missed, _any)


def _missed() -> None:
    raise Wrong("five trainings ended before their kill")


def _any(error: Exception) -> str:
    return "raised"


CAMPAIGN = Campaign(
    about="trainings killed, terminated or interrupted, on one rank and on two",
    cases=200,
    few=3,
    given=_given,
    attack=_attack,
    prepare=_prepare,
    seconds=60,
    memory=None,
)
