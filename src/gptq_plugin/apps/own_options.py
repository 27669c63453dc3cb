"""What the options of the commands themselves may be; those of the parts are checked by the parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptq_plugin.options import fields

_KINDS = {
    "adapter": fields.optional(fields.PATH, "no adapter"),
    "ckpt": fields.optional(fields.PATH, "the model's own weights"),
    "device": fields.NAME,
    "eval_batch_size": fields.integer(1),
    "evaluate": fields.SWITCH,
    "export_dir": fields.PATH,
    "overwrite": fields.SWITCH,
    "save_float": fields.SWITCH,
    "seed": fields.integer(0, 2**32 - 1),
}


def check_own_options(options: Mapping[str, Any]) -> None:
    """Checks those of the options that are at the top of a command's configuration.

    Raises:
        ValueError: One has another type, or is out of range; the message names it.
    """
    for name, kind in _KINDS.items():
        if name in options:
            kind.check(name, options[name])
