"""Checks of the arguments with which a QuantizeModule is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gptq_plugin.config import QuantizeConfig
from gptq_plugin.options import fields
from gptq_plugin.options.known_names import field_defaults, unknown_option

log = logging.getLogger(__name__)

_CONFIG = fields.of_type("a QuantizeConfig (QuantizeConfig.from_dict makes one of a mapping)", QuantizeConfig)
_SWITCH = fields.Kind("true, false or null (decide from free memory)", fields.optional(fields.SWITCH, "").accepts)
OPTIONS = {
    "offload_weights": _SWITCH,
    "offload_activations": _SWITCH,
    "exact_sums": _SWITCH,
    "cache_dir": fields.optional(fields.FOLDER, "nothing is kept"),
    "cache_gb": fields.between(0.001, 1e6),
    "resume": fields.SWITCH,
}

ALL = (*OPTIONS, *field_defaults(QuantizeConfig))  # that a QuantizeModule is made with, beside `config`


def check_fields(config: QuantizeConfig | None, given: Mapping[str, Any]) -> None:
    """Refuses fields that are unknown, or asked for beside a configuration.

    A parser of command lines gives all of them, and nobody can tell a default that was written from one that was not:
    those at their defaults ask for nothing, and a warning tells.
    """
    unknown = unknown_option(QuantizeConfig, given, {"QuantizeModule": OPTIONS})
    if unknown:
        raise ValueError(unknown)
    if config is None:
        return
    defaults = field_defaults(QuantizeConfig)
    asked = [name for name, value in given.items() if len(given) < len(defaults) or value != defaults[name]]
    if asked:
        raise TypeError(f"give a QuantizeConfig or its fields, not both: got {', '.join(asked)} beside config")
    others = [f"{name}={value!r}" for name, value in given.items() if value not in (None, getattr(config, name))]
    if others:
        log.warning("config is taken whole: %s beside it, as by default, does not count", ", ".join(others))


def check_options(config: QuantizeConfig, options: Mapping[str, Any]) -> None:
    _CONFIG.check("config", config)
    for name, value in options.items():
        OPTIONS[name].check(name, value)
    if not config.true_sequential:
        raise ValueError(
            "true_sequential=False saves time in tools that run the model once more for every layer. Lock-step "
            "calibration gives the result of true_sequential=True in one pass: leave the option out"
        )
