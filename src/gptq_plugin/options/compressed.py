"""Combinations of options that compressed-tensors has no readers for: `check_compressed`.

Tested by tests/test_config.py: as fields of a configuration.
"""

from __future__ import annotations

from typing import Any


def check_compressed(config: Any) -> None:
    """Refuses combinations that no client reads.

    Args:
        config: A QuantizeConfig with that checkpoint_format.

    Raises:
        ValueError: With what to use instead.
    """
    if config.desc_act and not config.static_groups:
        raise ValueError(
            "checkpoint_format='compressed-tensors' no longer supports groups in act-order (desc_act=True, "
            "static_groups=False): use desc_act=False, which is static act-order, or checkpoint_format='gptq'"
        )
    if config.bits == 8 and not config.sym:
        raise ValueError(
            "checkpoint_format='compressed-tensors' with bits=8 and sym=False runs on few GPUs, and is reported to "
            "fail there: use sym=True, or checkpoint_format='gptq_v2'"
        )
