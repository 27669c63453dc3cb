"""Runs jobs in a separate process, which is restarted if it dies or takes too long."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

MEMORY = 12 << 30  # bytes, a worker's limit of address space


class _Worker:
    def __init__(self, work: Callable[..., Any]):
        context = multiprocessing.get_context("spawn")
        self.mine, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.mine.close()


def run(
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    seconds: float,
    failed: Callable[[tuple[Any, ...], str], Any],
) -> Iterator[Any]:
    """Yields the result of `work(*job)` for each job, or `failed(job, reason)` if it does not return.

    Args:
        work: A function of a module that workers can import.
        jobs: Its arguments, one tuple per job.
        seconds: Time limit of a job.
        failed: Makes the result of a job that took too long or whose process died.
    """
    worker: _Worker | None = None
    try:
        for job in jobs:
            worker = worker or _Worker(work)
            worker.mine.send(job)
            # The process may die while a child of it keeps the pipe open.
            ready = wait([worker.mine, worker.process.sentinel], timeout=seconds)
            try:
                if worker.mine not in ready:
                    raise EOFError
                yield worker.mine.recv()
            except EOFError:
                worker.stop()
                code = worker.process.exitcode
                worker = None
                yield failed(job, f"took more than {seconds:.0f} s" if not ready else f"its process died ({code})")
    finally:
        if worker is not None:
            worker.stop()


def _serve(jobs: Connection, work: Callable[..., Any]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        jobs.send(work(*job))
