"""A stand-in for `sys.executable` that starts at once: its processes are forked from one that has imported everything.

`python()` returns its path. It takes what tests give to Python: a script, `-c CODE` or `-m MODULE`, and arguments. What
it starts has it as `sys.executable`, so launchers start their ranks with it too. Only a test of what happens before the
first line of a script (imports, options of Python, variables read then) or after the last needs the real one.

`python()` starts a server, which imports and then waits at a socket. The stand-in, this file too, brings it arguments,
environment, folder and open files; it hands signals on to the process that is forked, and ends as that one does. Where
the stand-in is killed, so are that process and its group.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from select import select
from types import ModuleType

IMPORTED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torch.distributed.tensor.parallel",
    "lightning.pytorch",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "gptq_plugin.apps.finetune",
    "gptq_plugin.apps.quantize",
    "gptq_plugin.hf.trainer_callback",
    "gptq_plugin.lightning.callback",
)
HANDED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
READ_AT_IMPORT = ("PYTHON", "HF_", "TRANSFORMERS_", "TRITON_")
OTHERS = {"HF_XET_HIGH_PERFORMANCE"}  # set by lm_eval where it is imported; read when files are fetched


def python() -> str:
    """The path of the stand-in. The first call starts the server; it ends with this process.

    Where there are no pidfds, as elsewhere than on Linux, it is `sys.executable`.
    """
    return _start() if has_pidfds() else sys.executable


def has_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not in this Python, or not in this kernel
        return False
    return True


@cache
def _start() -> str:
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="python-", dir="/tmp"))  # a socket's path has to be short
    stand_in, us = folder / "python", Path(__file__).resolve()
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{us}" ask "{folder}" "$@"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    alive, ours = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(64)  # who comes during the imports waits
        server = subprocess.Popen(
            [sys.executable, us, "serve", folder, str(listening.fileno()), str(alive)],
            pass_fds=(listening.fileno(), alive),
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # read while torch is imported
            start_new_session=True,
        )
    os.close(alive)
    atexit.register(lambda: (os.close(ours), server.wait(60)))
    return str(stand_in)


def ask(folder: str, *arguments: str) -> int:
    """The stand-in: returns what the process that is forked for it ended with."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"{folder}/socket")
        # From when the process runs until they can be handed on, signals wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [request.encode()], [0, 1, 2])
        pid = int(server.recv(64))
        for number in HANDED_ON:
            signal.signal(number, lambda received, _: os.kill(pid, received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
        ended = os.waitstatus_to_exitcode(int(server.recv(64)))
    if ended < 0:
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), -ended)
    return ended


def serve(folder: str, listening_at: str, alive_at: str) -> list[str]:
    """Imports, and forks a process for each request. Returns in those, with their arguments."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    read = _read_at_import(os.environ)
    listening, alive = socket.socket(fileno=int(listening_at)), int(alive_at)
    while alive not in select([listening, alive], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork():
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # earlier keepers
                    pass
            continue
        listening.close()
        request, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        pid = os.fork()
        os.setpgid(pid, pid)  # in both: then it has been called wherever one of them goes on
        if pid:
            _keep(pid, connection, alive)
        connection.send(str(os.getpid()).encode())
        connection.close()
        os.close(alive)
        arguments, where, environment = json.loads(request)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        now = _read_at_import(environment)
        if now != read:
            raise ValueError(f"use sys.executable: libraries have read {read} at import, and here is {now}")
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(where)
        sys.executable = f"{folder}/python"
        return arguments
    for left in Path(folder).iterdir():
        left.unlink()
    os.rmdir(folder)
    os._exit(0)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name not in OTHERS
    }


def _keep(pid: int, connection: socket.socket, alive: int) -> None:
    """Waits until the process ends, or for the end of the stand-in or of who started the server, and kills it then."""
    process = os.pidfd_open(pid)
    if process not in select([process, connection, alive], [], [])[0]:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(status).encode())
    os._exit(0)


def run(arguments: list[str]) -> None:
    """As Python does with these arguments."""
    first, *rest = arguments
    if first == "-u":  # torchrun
        sys.stdout.reconfigure(write_through=True)
        first, *rest = rest
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = ModuleType("__main__")
    if first == "-c":
        code, name = rest.pop(0), "<string>"
        sys.path[0] = ""
    elif first.startswith("-"):
        raise ValueError(f"use sys.executable: no option {first} here")
    else:
        code, name = Path(first).read_bytes(), os.path.abspath(first)
        sys.path[0], main.__file__ = os.path.dirname(os.path.realpath(first)), name
    sys.argv, sys.modules["__main__"] = [first, *rest], main
    exec(compile(code, name, "exec"), main.__dict__)


def end(arguments: list[str]) -> None:
    """Runs these, and ends the process without taking apart what was imported, which would take a second."""
    status: int | str | None = 0
    try:
        run(arguments)
    except SystemExit as exiting:
        status = exiting.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status or 0)


if __name__ == "__main__":
    role, *places = sys.argv[1:]
    if role == "ask":
        sys.exit(ask(*places))
    end(serve(*places))
