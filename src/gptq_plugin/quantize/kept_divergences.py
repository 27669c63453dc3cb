"""Divergences that earlier runs measured with the same layers on the same batches: `kept_divergences`.

Tested by tests/quantize/test_kept_pass.py: with budgets that are divided again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from gptq_plugin import distributed
from gptq_plugin.allocation.units import Unit
from gptq_plugin.cache.fingerprint import Fingerprint, NotKnown
from gptq_plugin.calibration.collect import Calibration
from gptq_plugin.quantize.options import PassOptions

Divergences = tuple[list[float], int]


def kept_divergences(
    options: PassOptions,
    trial: str | None,
    calibration: Calibration,
    units: Sequence[Unit],
    measure: Callable[[], Divergences],
) -> Divergences:
    """The divergences that are kept, or those that are measured, and kept. Every rank calls it.

    Args:
        options: With a folder, or without.
        trial: The hash of the model and the quantized layers, see `OnePass.key`; None if there is none.
        calibration: This rank's batches to measure on.
        units: The layers that are put into the float model together.
        measure: Measures them.
    """
    kept = options.kept()
    if kept is None or trial is None:
        return measure()
    key = _key(trial, calibration, units)
    if key is None:
        return measure()
    known = kept.read("divergences", key)
    if known is not None:
        return known.facts["divergences"], known.facts["tokens"]
    found, tokens = measure()
    kept.write("divergences", key, {"divergences": found, "tokens": tokens}, {})
    return found, tokens


def _key(trial: str, calibration: Calibration, units: Sequence[Unit]) -> str | None:
    batches = Fingerprint()
    try:
        batches.add("batches", [(batch.data, batch.samples) for batch in calibration.batches])
        batches.add("places", [list(calibration.numbers), calibration.of_all_ranks])
        own = batches.hexdigest()
    except NotKnown:
        own = ""
    of_all = distributed.gather_objects(own)
    parts = trial, of_all, [(unit.name, list(unit.names)) for unit in units]
    return hashlib.sha256(repr(parts).encode()).hexdigest() if all(of_all) else None
