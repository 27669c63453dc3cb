"""Calls a function in two processes, which are the ranks of one node, as torchrun would start them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from forked_python import python
from paths import SUPPORT
from ports import reserved_port


def launch(module: str, function: str, folder: Path, *arguments: str, ranks: int = 2, **environment: Any) -> None:
    """Calls a function of a module in tests/support on every rank, with a folder and more; raises if one fails."""
    environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                    "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = f"import sys, pathlib; sys.path.insert(0, sys.argv[1]); import {module} as runs; "
    command += f"runs.{function}(pathlib.Path(sys.argv[2]), *sys.argv[3:])"
    with reserved_port() as port:
        environment["MASTER_PORT"] = str(port)
        processes = [
            subprocess.Popen(
                [python(), "-c", command, SUPPORT, folder, *arguments],
                env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        try:
            assert [process.wait(timeout=240) for process in processes] == [0] * ranks
        finally:
            for process in processes:
                process.kill()
