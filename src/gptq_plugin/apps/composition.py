"""Errors of Hydra and OmegaConf as errors of a command line: they name the override, or the file.

Tested by tests/apps/test_command_line.py: what makes no configuration.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptq_plugin.errors import brief

_COMMANDS = "gptq_plugin.apps.cli"  # whose folder a relative --config-path begins in, as Hydra has it


def composition_problems(given: Namespace, name: str, config_path: str) -> list[str]:
    """Returns a sentence about the first override, or the file, with which Hydra composes no configuration, if any.

    Args:
        given: The command line, as Hydra's parser reads it; its overrides can be read.
        name: Of the configuration.
        config_path: Where it lies, without ``--config-path``.
    """
    if given.config_dir is not None and not os.path.isdir(given.config_dir):
        return [f"--config-dir={given.config_dir} is no folder"]
    if _error(given, name, config_path, given.overrides) is None:
        return []
    for count in range(len(given.overrides) + 1):
        error = _error(given, name, config_path, given.overrides[:count])
        if error is not None:
            what = given.overrides[count - 1] if count else f"the configuration {name}"
            return [f"{brief(what, 200)}: {_told(error)}"]
    return []


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Overrides that can be read. Hydra must be initialized: ``glob`` looks for a group's choices."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def first_of(override: Override) -> str:
    """The override as it is written, of a sweep its first run's."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    return f"{line.partition('=')[0]}={next(iter(override.sweep_string_iterator()), 'null')}"


@contextlib.contextmanager
def options_explained(config: DictConfig) -> Iterator[None]:
    """Raises a CompactHydraException, which Hydra shows without a traceback, for an error of OmegaConf's in the block:
    an option has a value that cannot be had. Hydra shows its cause too."""
    try:
        yield
    except OmegaConfBaseException as error:
        option = getattr(error, "full_key", None) or _unresolved(config)
        raise CompactHydraException(f"{option or 'an option'} has a value that cannot be had:") from error


def _error(given: Namespace, name: str, config_path: str, overrides: Sequence[str]) -> Exception | None:
    state = HydraConfig.instance().cfg
    try:
        search_path = create_automatic_config_search_path(None, _COMMANDS, given.config_path or config_path)
        if given.config_dir is not None:
            own, before = f"file://{os.path.abspath(given.config_dir)}", SearchPathQuery(provider="schema")
            search_path.prepend(provider="command-line", path=own, anchor=before)
        hydra = Hydra.create_main_hydra2("composition", search_path)
        lines = [first_of(one) for one in parsed(overrides)]
        config = hydra.compose_config(name, lines, RunMode.RUN)
        HydraConfig.instance().set_config(config)
        for key in ("hydra.run.dir", "hydra.sweep.dir"):
            OmegaConf.select(config, key)
        if given.resolve:  # as Hydra does to show it
            OmegaConf.set_readonly(config.hydra, None)
            shown: Any = hydra.get_sanitized_cfg(config, given.cfg)
            if given.package not in (None, "_global_"):
                shown = OmegaConf.select(shown, given.package)
            if isinstance(shown, Container):
                OmegaConf.resolve(shown)
    except Exception as error:  # noqa: BLE001  Hydra lets what it does not expect pass
        return error
    finally:
        HydraConfig.instance().cfg = state
        GlobalHydra.instance().clear()
    return None


def _told(error: BaseException) -> str:
    """The error and its cause on one line."""
    texts = [str(one) for one in (error, error.__cause__) if one is not None]
    return brief(" ".join(" ".join(dict.fromkeys(texts)).split()))


def _unresolved(config: DictConfig) -> str | None:
    """The first option whose value cannot be had; None if all can."""
    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while waiting:
        key, value = waiting.pop(0)
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}" if key else str(name), own) for name, own in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{key}[{number}]", own) for number, own in enumerate(value)]
        elif isinstance(value, str):
            try:
                found = OmegaConf.select(config, key, throw_on_missing=True)
                OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else None
            except OmegaConfBaseException:
                return key
    return None
