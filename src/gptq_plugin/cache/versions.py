"""Packages whose code is known by a version, and the versions and settings that results depend on.

Tested by tests/cache/test_fingerprint.py: in fingerprints.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import random
import sys
from pathlib import Path

import numpy as np
import torch

_INSTALLED = {
    "accelerate",
    "deepspeed",
    "gptq_plugin",
    "gptq_triton",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "numpy",
    "peft",
    "pytorch_lightning",
    "safetensors",
    "tokenizers",
    "torch",
    "torchmetrics",
    "transformers",
    "triton",
}

TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric", "accelerate")  # their objects compute no layer


def package_of(module: str | None) -> str:
    """The package of a Python module."""
    return (module or "").partition(".")[0]


def is_versioned(module: str | None) -> bool:
    """True if a version tells what the code of a Python module does: that of Python, or of a package known here."""
    package = package_of(module)
    return package in _INSTALLED or (package in sys.stdlib_module_names and package != "__main__")


@functools.cache
def version_of(package: str) -> str:
    """The version of a package; of this one, which may be under development, a digest of its files too."""
    if package in sys.stdlib_module_names:
        return sys.version
    if package in ("gptq_plugin", "gptq_triton"):
        spec = importlib.util.find_spec(package)
        return _digest_of_files(Path(((spec and spec.submodule_search_locations) or [""])[0]))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def surroundings(device: torch.device) -> dict[str, str]:
    """The versions, the machine and the settings that a computation's last bits depend on.

    Args:
        device: Where it runs.
    """
    found = {name: version_of(name) for name in ("torch", "transformers", "numpy", "gptq_plugin", "gptq_triton")}
    found |= {
        "python": sys.version,
        "torch's commit": str(torch.version.git_version),
        "device": device.type,
        "processor": f"{platform.machine()} {_processor()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "precision": f"{torch.get_float32_matmul_precision()} {torch.get_default_dtype()}",
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "mkldnn": str(torch.backends.mkldnn.enabled),
        "autocast": str([(one, torch.is_autocast_enabled(one), torch.get_autocast_dtype(one)) for one in _AUTOCAST]),
    }
    if device.type == "cuda":
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        found |= {
            "gpu": f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}",
            "cuda": f"{torch.version.cuda} {cudnn.version()}",
            "tf32": f"{matmul.allow_tf32} {cudnn.allow_tf32} {cudnn.benchmark} {cudnn.deterministic}",
            "reductions": f"{matmul.allow_fp16_reduced_precision_reduction} "
            f"{matmul.allow_bf16_reduced_precision_reduction}",
            "attention": str(
                [
                    torch.backends.cuda.flash_sdp_enabled(),
                    torch.backends.cuda.mem_efficient_sdp_enabled(),
                    torch.backends.cuda.math_sdp_enabled(),
                    torch.backends.cuda.cudnn_sdp_enabled(),
                ]
            ),
        }
    return found


def random_states(device: torch.device) -> list[bytes]:
    """The states of the random generators that a forward may draw from."""
    states = [
        torch.get_rng_state().numpy().tobytes(),
        repr(random.getstate()).encode(),
        repr(np.random.get_state(legacy=False)["state"]).encode(),
    ]
    return states + ([torch.cuda.get_rng_state(device).numpy().tobytes()] if device.type == "cuda" else [])


_AUTOCAST = ("cpu", "cuda")


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _digest_of_files(folder: Path) -> str:
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        hashed.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return hashed.hexdigest()
