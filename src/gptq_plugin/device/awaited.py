"""The ranks' signs of life, and what waits for other ranks on a GPU: `Awaited` learns that one of them is lost.

A kernel of NCCL does not notice that a process of the same host was killed. It waits until the group's timeout, and
with it whatever waits for the device: a value that the host reads before the next check-in, or the end of the process.
So every rank counts in the process group's store, from a thread of its own. One whose count stands still while an
operation waits is lost.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

BEAT = 1.0  # seconds from count to count
MISSED = 15  # counts of this rank in which another's stands still until it is lost; a rank that waits too stands still
PATIENCE = 5.0  # seconds in which an operation ends that all ranks have come to


class Awaited:
    """The last operation on GPUs that ranks wait for, and the ranks' signs of life.

    Args:
        store: The process group's, a `torch.distributed.Store`.
        keys: Where each rank counts. All ranks have made this object before one of them queues an operation.
        rank: This one.
        abort: Ends the operations of the process group on this rank.
    """

    def __init__(self, store: Any, keys: Sequence[str], rank: int, abort: Callable[[], None]) -> None:
        self._store = store.clone()  # of its own, so that neither waits for the other's reading
        self._keys, self._own, self._abort = list(keys), keys[rank], abort
        self._event: Any = None
        self._changes = threading.Lock()  # of the event
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._store.set(self._own, "0")

    def queued(self, event: Any) -> None:
        """Takes note of an operation.

        Args:
            event: A `torch.cuda.Event` behind it.
        """
        with self._changes:
            self._event = event
        self.live()

    def live(self) -> None:
        """Has this rank give signs of life from here on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="gptq_plugin awaited", daemon=True)
            self._thread.start()

    def sign_of(self, rank: int) -> bytes:
        """A rank's last sign of life, by which it is told from the one before."""
        return bytes(self._store.get(self._keys[rank]))

    def give_up(self) -> None:
        """Ends the last operation unless it ends within seconds: a rank is known to be lost, or to have failed."""
        deadline = time.monotonic() + PATIENCE
        while self._waits():
            if time.monotonic() > deadline:
                self._end("a rank that does not come")
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the thread; the operation is left as it is."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE)

    def _waits(self) -> bool:
        """Whether the last operation has not ended. Once it has, it is forgotten: to ask the device again, from this
        thread, would break a CUDA graph that another one captures."""
        event = self._event
        if event is None:
            return False
        if event.query():
            with self._changes:
                if self._event is event:
                    self._event = None
            return False
        return True

    def _end(self, whom: str) -> None:
        self._event = None
        log.error("an operation on GPUs waits for %s: the process group is aborted", whom)
        self._abort()

    def _watch(self) -> None:
        count, seen = 0, [b""] * len(self._keys)
        missed = [0] * len(self._keys)
        while not self._stopped.wait(BEAT):
            count += 1
            waits, now = self._waits(), seen
            with contextlib.suppress(RuntimeError):  # the store is gone, and rank 0 with it: no count goes on
                self._store.set(self._own, str(count))
                if waits:
                    now = list(self._store.multi_get(self._keys))
            missed = [
                times + 1 if waits and new == old else 0 for times, new, old in zip(missed, now, seen, strict=True)
            ]
            seen = now
            lost = [str(rank) for rank, times in enumerate(missed) if times >= MISSED]
            if lost:
                self._end(f"rank {', '.join(lost)}, which gave no sign of life in {MISSED * BEAT:.0f} s")
                return
