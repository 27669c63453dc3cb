"""Output whose reader is gone, or whose encoding lacks a letter, stops no command: `output_never_fails`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast


@contextmanager
def output_never_fails() -> Iterator[None]:
    """Inside, both standard streams may lose their reader (``| head``, ``| true``), or be closed from the beginning
    (``>&-``): what is written is dropped, and the command goes on to its end and its own exit status. Letters that
    their encoding lacks (``PYTHONIOENCODING=ascii``) are written as escapes, as ``\\u6f22``.

    A run that trains is not thrown away by a pager that was quit, and no rank leaves the others in a collective.
    """
    with ExitStack() as stack:
        out, err = (
            _Stream(stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream)
            for stream in (sys.stdout, sys.stderr)
        )
        stack.callback(err.flush)
        stack.callback(out.flush)  # at the process's end it would be too late
        stack.enter_context(redirect_stdout(cast(TextIO, out)))
        stack.enter_context(redirect_stderr(cast(TextIO, err)))
        yield


def printable(text: str) -> str:
    """A text in which control characters are escapes, ``\\x1b``, so that names in a foreign file do not command the
    terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class _Stream:
    """A text stream that drops what nobody reads any more, and writes what it cannot as escapes; in all else the stream
    it is made of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
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
