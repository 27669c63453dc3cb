"""Machines without a GPU, or without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_cases import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_the_triton_kernels_pass_in_the_interpreter():
    """TRITON_INTERPRET=1 must be set before Triton is imported, so they run in a process of their own."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(Path(__file__).parent),
        "-q",
        "-k",
        "triton and cpu",
        "-p",
        "no:cacheprovider",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]


def test_the_package_imports_without_triton_and_the_kernels_error_names_what_to_install():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import gptq_plugin.kernels.reference, gptq_plugin.layers.qlinear\n"
        "try: import gptq_plugin.kernels.matmul\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "pip install triton" in run.stdout
