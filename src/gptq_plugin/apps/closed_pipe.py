"""Output whose reader is gone (``| head``, ``| true``) goes nowhere: `output_may_be_closed`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast


@contextmanager
def output_may_be_closed() -> Iterator[None]:
    """Inside, both standard streams may lose their reader: what is written afterwards is dropped, and the command goes
    on to its end and its own exit status.

    A run that trains is not thrown away by a pager that was quit, and no rank leaves the others in a collective.
    """
    out, err = _Dropping(sys.stdout), _Dropping(sys.stderr)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        try:
            yield
        finally:
            out.flush()  # at the process's end it would be too late
            err.flush()


class _Dropping:
    """A text stream that drops what nobody reads any more; in all else the stream it is made of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Leads the stream's file descriptor nowhere: for what it still buffers, and for processes started later."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
