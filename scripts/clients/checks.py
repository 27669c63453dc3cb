"""Shared by the checks of all clients: `run` checks one folder after the other and prints a JSON line for each.

A client is imported once. If the process ends, by an abort in native code or a folder that takes longer than LIMIT,
that is the folder's result, and `run.py` restarts with the next one. With `fork`, each folder has its own process,
forked after the import. Imports nothing of gptq_plugin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from reference import reference_of
from safetensors.torch import load_file

LIMIT = 150  # seconds per folder


def run(
    check: Callable[[Path, list[int]], torch.Tensor],
    tolerance: float,
    packages: tuple[str, ...],
    note: str | None = None,
    fork: bool = False,
) -> None:
    """Checks the folders of the command line; the exit status is 0 when all passed, else 1.

    Args:
        check: Loads a folder with the client and returns its log-probabilities for a prompt,
            [tokens, vocabulary].
        tolerance: Largest difference from the reference's that passes.
        packages: Packages whose versions are reported.
        note: A remark for the results.
        fork: Use a process per folder, for a client that leaves state behind.
    """
    passed = True
    for folder in map(Path, sys.argv[1:]):
        started = time.perf_counter()
        result = (_forked if fork else _tried)(lambda folder=folder: _compare(check, folder, tolerance))
        result = {
            "folder": folder.name,
            "passed": False,
            "difference": None,
            "error": None,
            **result,
            "tolerance": tolerance,
            "seconds": round(time.perf_counter() - started, 1),
            "note": note,
            "versions": {package: _version(package) for package in packages},
        }
        passed &= bool(result["passed"])
        print("\nRESULT " + json.dumps(result), flush=True)
    os._exit(0 if passed else 1)  # clients leave threads behind


def _compare(check: Callable[[Path, list[int]], torch.Tensor], folder: Path, tolerance: float) -> dict[str, object]:
    reference = load_file(reference_of(folder))
    measured = check(folder, reference["tokens"].tolist()).float()
    expected = reference["logits"].float().log_softmax(-1)
    if measured.shape != expected.shape:
        return {"error": f"log-probabilities {tuple(measured.shape)} instead of {tuple(expected.shape)}"}
    difference = (measured - expected).abs().max().item()
    return {"passed": difference <= tolerance, "difference": difference}  # NaN does not pass


def _tried(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    signal.alarm(LIMIT)  # ends the process
    try:
        return work()
    except BaseException as error:  # noqa: BLE001 - whatever a client raises is its answer
        traceback.print_exc()
        return {"error": _chain(error)}
    finally:
        signal.alarm(0)


def _forked(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, json.dumps(_tried(work)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return dict(json.loads(answer))
    return {"error": f"the process ended with status {os.waitstatus_to_exitcode(status)}"}


def _chain(error: BaseException | None) -> str:
    """An error and its causes, outermost first."""
    said = []
    while error is not None and len(said) < 4:
        said.append(f"{type(error).__name__}: {error}"[:3000])
        error = error.__cause__ or error.__context__
    return " <- ".join(said)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
