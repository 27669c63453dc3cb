"""Commands whose output nobody reads any more: quiet, to their end, with their own exit status."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_plugin.apps.output import output_never_fails, printable


@pytest.fixture
def unread(monkeypatch):
    """unread(buffering): makes both standard streams pipes without a reader."""
    opened = []

    def replace(buffering):
        for name in ("stdout", "stderr"):
            reader, writer = os.pipe()
            os.close(reader)
            file = os.fdopen(writer, "wb", buffering=-1 if buffering else 0)
            stream = io.TextIOWrapper(file, write_through=not buffering)
            opened.append(stream)
            monkeypatch.setattr(sys, name, stream)
        return opened

    yield replace
    monkeypatch.undo()
    for stream in opened:
        stream.close()  # raises if anything is still to be written to the pipe


@pytest.mark.parametrize("buffering", [True, False])
def test_what_is_printed_or_logged_without_a_reader_is_dropped_and_the_work_is_done(buffering, unread):
    streams = unread(buffering)
    done = []
    with output_never_fails():
        handler = logging.StreamHandler(sys.stdout)
        for number in range(3):
            print("a line" * 5000)
            handler.emit(logging.makeLogRecord({"msg": "logged"}))
            sys.stderr.writelines(["one\n", "two\n"])
            done.append(number)
        assert not sys.stdout.isatty() and sys.stdout.fileno() == streams[0].fileno()
        subprocess.run([sys.executable, "-c", "print(1, flush=True)"], stdout=sys.stdout, check=True)
    assert done == [0, 1, 2] and [sys.stdout, sys.stderr] == streams


def test_what_is_read_arrives_and_other_errors_are_raised(capsys):
    with pytest.raises(BrokenPipeError, match="a socket"), output_never_fails():
        print("out")
        print("err", file=sys.stderr)
        raise BrokenPipeError("a socket")
    assert capsys.readouterr() == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("line", "status", "unbuffered"),
    [("gptq-finetune --help", 0, ""), ("gptq-quantize --cfg job", 0, "1"), ("gptq-plugin check nowhere", 1, "")],
)
def test_the_installed_commands_end_quietly_with_their_own_status(line, status, unbuffered, tmp_path):
    name, *arguments = line.split()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [Path(sys.executable).parent / name, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert done.returncode == status and "pipe" not in done.stderr and "Traceback" not in done.stderr
    assert status or not done.stderr


def test_letters_that_the_encoding_lacks_are_escapes_and_nothing_fails(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with output_never_fails():
        print("ein Maß, 漢字 and \U0001f600")
        sys.stdout.writelines(["…\n"])
    assert raw.getvalue() == b"ein Ma\\xdf, \\u6f22\\u5b57 and \\U0001f600\n\\u2026\n"


def test_control_characters_do_not_reach_the_terminal():
    assert printable("two\nlines\tof 漢字") == "two\nlines\tof 漢字"
    assert printable("\x1b[2J\r\x9b\u202e\udc80") == "\\x1b[2J\\r\\x9b\\u202e\\udc80"


def test_streams_that_are_closed_from_the_beginning_take_everything(monkeypatch):
    """Python has None for them."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    done = []
    with output_never_fails():
        print("out 漢字")
        print("err", file=sys.stderr, flush=True)
        done.append(sys.stdout.isatty())
    assert done == [False] and sys.stdout is None
