"""Options and helpers shared by the tests."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn

from paths import REPOSITORY

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Looks for no garbage while the tests are imported. Nothing is frozen: each quantization, export and loading asks
    Python how much is, which would count a million objects."""
    gc.disable()
    yield
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Files with slow tests first: where processes share the files, none waits at the end for another's long one.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with real models and texts; tests that need it skip without it."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "models" / "pycode-29m").is_dir():
        pytest.skip(f"needs {folder} with models/ and data/ (see CONTRIBUTING.md)")
    return folder


@pytest.fixture(scope="session")
def modules_cache() -> Callable[[Path], AbstractContextManager[None]]:
    """modules_cache(folder), a context in which transformers keeps the code that comes with models there. Afterwards
    the process has forgotten it: the next one's is another folder."""

    @contextlib.contextmanager
    def kept_in(folder: Path) -> Iterator[None]:
        from transformers import dynamic_module_utils

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
            patch.setattr(sys, "path", list(sys.path))  # transformers appends the folder
            yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    return kept_in


@pytest.fixture(scope="session")
def rtn() -> Callable[..., nn.Module]:
    """rtn(model, config, permuted=False): quantizes in place to the nearest grid points, without calibration.

    `permuted` puts input channels into groups at random, as the original act-order does.
    """
    from gptq_plugin.gptq.solver import round_to_nearest
    from gptq_plugin.layers.qlinear import QuantLinear
    from gptq_plugin.layers.swap import swap_modules
    from gptq_plugin.model.structure import Structure
    from gptq_plugin.model.targets import find_targets

    def quantize(model: nn.Module, config, permuted: bool = False) -> nn.Module:
        layers: dict[str, nn.Module] = {}
        for target in find_targets(Structure.of(model), config)[0]:
            channels = target.weight.shape[1]
            order = torch.randperm(channels) if permuted else torch.arange(channels)
            back = order.argsort()
            quantized = round_to_nearest(target.weight[:, order], target.config)
            quantized = dataclasses.replace(
                quantized,
                codes=quantized.codes[:, back].contiguous(),
                g_idx=quantized.g_idx[back].contiguous(),
            )
            layers[target.name] = QuantLinear.from_quantized(quantized, target.bias)
        swap_modules(model, layers)
        return model.eval()

    return quantize


@pytest.fixture(scope="session")
def same_but_for_the_run() -> Callable[[Path, Path], bool]:
    """same_but_for_the_run(one, other): two quantize_config.json are the same to the byte but for when and by which run
    they were made (`provenance.run_stamp`)."""

    def told(file: Path) -> str:
        return re.sub(r'"(date|run_id)": "[^"]*"', "", file.read_text(encoding="utf-8"))

    return lambda one, other: told(one) == told(other)
