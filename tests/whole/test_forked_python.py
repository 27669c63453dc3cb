"""tests/support/forked_python.py: what it starts does what Python's own process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked_python import has_pidfds, python

pytestmark = pytest.mark.skipif(not has_pidfds(), reason="needs Linux's pidfds")

CODES = {
    "arguments and place": "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), os.environ['OWN'], __name__)",
    "input": "print(input())",
    "status": "import sys; sys.exit(7)",
    "sentence": "import sys; print('last', end=''); sys.exit('a sentence')",
    "error": "import atexit; atexit.register(print, 'bye'); {}['lost']",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "raise KeyboardInterrupt",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print('done'))).start()",
    "main": "import sys; class_ = type('A', (), {}); print(sys.modules['__main__'].class_ is class_)",
}


def outcome(interpreter: str, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Status, output, and the last line of errors."""
    done = subprocess.run([interpreter, *arguments], cwd=folder, input="given\n", capture_output=True, text=True,
                          env={**os.environ, "OWN": "ä"}, timeout=120)  # fmt: skip
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("code", CODES)
def test_code_ends_as_in_python(code, tmp_path):
    arguments = "-c", CODES[code], "-x", "two words"
    assert outcome(python(), tmp_path, *arguments) == outcome(sys.executable, tmp_path, *arguments)


@pytest.mark.parametrize("words", [["sub/own.py", "-m"], ["-m", "own", "x"], ["-u", "-m", "own"], ["sub/none.py"]])
def test_scripts_and_modules_run_as_in_python(words, tmp_path):
    script = "import sys, __main__; print(__name__, sys.argv, sys.path[0], __file__, bool(__main__.__spec__))"
    for place in (tmp_path / "sub" / "own.py", tmp_path / "own.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(script)
    (status, out, _), (expected, expected_out, _) = (outcome(p, tmp_path, *words) for p in (python(), sys.executable))
    assert out == expected_out and bool(status) == bool(expected)


def test_what_it_starts_has_it_for_python():
    assert outcome(python(), Path.cwd(), "-c", "import sys; print(sys.executable)") == (0, f"{python()}\n", "")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 5)]
)
def test_a_signal_reaches_the_process(number, status):
    code = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
try:
    print(os.getpid(), flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    sys.exit(5)
"""
    process = subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(60) == status
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "error"),
    [
        (["-W", "error", "-c", "1"], {}, "use sys.executable: no option -W here"),
        (["-c", "1"], {"HF_HOME": "elsewhere"}, "use sys.executable: libraries have read "),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, variables, error):
    done = subprocess.run([python(), *arguments], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 1 and error in done.stderr
