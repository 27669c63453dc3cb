"""Two ranks of which one is lost, in every way and everywhere, started by torchrun, by Lightning and by hand.

All ranks and the launcher must end within 30 seconds, by an error, and the cause is in what they tell. The checkpoints
of the training are whole, and there is no export; hidden folders of a process that was killed go with the next run.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NoReturn

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  before the forks
from campaigns.campaign import Campaign, Case, Wrong
from campaigns.offspring import adopt, end_offspring, offspring
from campaigns.rank_run import start_by_hand

from gptq_plugin.export.export_dir import check_export_dir

LAUNCHERS = ("torchrun", "Lightning", "by hand")
KINDS = ("raise", "kill", "exit", "Ctrl-C", "never")
PHASES = ("data", "meeting", "calibration", "reduction", "solve", "export")
CAUSES = {
    "raise": ("MemoryError: no room",),
    "kill": ("cannot reach the others", "SIGKILL", "-9"),
    "exit": ("SystemExit: 3", "exit code 3", "exitcode  : 3", "code 3"),
    "Ctrl-C": ("KeyboardInterrupt", "SIGINT", "SystemExit: 1"),  # which Lightning makes of it
    "never": ("did not come", "the process group's timeout", "timed out", "Timed out"),
}
SECONDS = 30
Cell = tuple[str, str, str]


def _cells(seed: int, count: int) -> Iterator[Cell]:
    """All combinations, a launcher after the other, in an order of the seed's, and again if more are asked for."""
    rng, cells = Random(seed), list(itertools.product(KINDS, PHASES))
    orders = [[(launcher, *cell) for cell in rng.sample(cells, len(cells))] for launcher in LAUNCHERS]
    return itertools.islice(itertools.cycle(cell for some in zip(*orders, strict=True) for cell in some), count)


def _attack(case: Case, cell: Cell) -> None:
    case.is_of(", ".join(cell))
    try:
        case.attempt("end", lambda: _lose(case.folder, *cell), lambda error: "raised")
    finally:
        end_offspring()


def _lose(folder: Path, launcher: str, kind: str, phase: str) -> None:
    adopt()
    process = _started(launcher, kind, phase, folder)
    while not (folder / "reached").exists():
        if _code(process) is not None:
            raise Wrong(f"it ended before the rank was lost: {_output(folder)[-1500:]}")
        time.sleep(0.01)
    reached = time.monotonic()
    if kind == "Ctrl-C":
        time.sleep(0.3)
        os.killpg(process, signal.SIGINT)  # as a terminal does
    code = None
    while code is None or offspring():
        code = _code(process) if code is None else code
        if time.monotonic() - reached > SECONDS:
            raise Wrong(f"{offspring()} live after {SECONDS} s: {_output(folder)[-1500:]}")
        time.sleep(0.05)
    _judge(folder, code, launcher, kind, phase)


def _started(launcher: str, kind: str, phase: str, folder: Path) -> int:
    """Starts the launcher in a session of its own; returns its process's number."""
    process = os.fork()
    if not process:
        _be_launcher(launcher, kind, phase, folder)
    return process


def _be_launcher(launcher: str, kind: str, phase: str, folder: Path) -> NoReturn:
    os.setsid()
    os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if launcher == "by hand":
        try:
            start_by_hand(kind, phase, folder)
            os._exit(0)
        except BaseException:  # noqa: BLE001  this process ends here
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(__file__).with_name("rank_run.py")), kind, phase, str(folder)]
    os.execv(sys.executable, [sys.executable, *(torchrun if launcher == "torchrun" else []), *script])


def _code(process: int) -> int | None:
    """The exit status of a process that has ended, asked for once."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _output(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")


def _prepare(folder: Path) -> None:
    torch.set_num_threads(1)


def _judge(folder: Path, code: int, launcher: str, kind: str, phase: str) -> None:
    output = _output(folder)
    if code == 0:
        raise Wrong(f"the launcher ended with 0: {output[-1500:]}")
    tales = {file.name: file.read_text() for file in sorted(folder.glob("[01].txt"))}
    if launcher == "by hand" and phase == "export" and "Connection closed by peer" in tales.get("1.txt", ""):
        del tales["1.txt"]  # it waited in the user's own barrier: only the launcher can tell it why
    for name, tale in {**tales, "all output": output + str(tales)}.items():
        if not any(cause in tale for cause in CAUSES[kind]):
            raise Wrong(f"{name} has no cause: {tale[-1500:]}")
    if (folder / "export").exists():
        raise Wrong("there is an export")
    check_export_dir(folder / "export")
    hidden = [one.name for one in folder.iterdir() if one.name.startswith(".")]
    if hidden:
        raise Wrong(f"left behind: {hidden}")
    if launcher != "by hand" and phase != "meeting":
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


CAMPAIGN = Campaign(
    about="one of two ranks raises, is killed, exits, is interrupted or never calls, at each phase",
    cases=len(LAUNCHERS) * len(KINDS) * len(PHASES),
    few=2,
    given=_cells,
    attack=_attack,
    prepare=_prepare,
    seconds=120,
    memory=None,
)
