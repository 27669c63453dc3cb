"""What a run took from earlier ones, in a sentence: `cache_summary`.

Tested by tests/quantize/test_kept_pass.py: with runs that take something.
"""

from __future__ import annotations

from collections.abc import Mapping

from gptq_plugin.report.numbers import format_bytes


def cache_summary(counts: Mapping[str, int]) -> str | None:
    """The sentence; None without `cache_dir`.

    Args:
        counts: ``layers_taken`` and ``layers_solved``; ``hessians_taken``, the number of solutions with a kept Hessian;
            ``walk_taken``, 1 if no batch had to walk beyond the first layers; ``bytes_written``.
    """
    if not counts:
        return None
    hessians = f", {counts['hessians_taken']} with a Hessian from there" if counts["hessians_taken"] else ""
    walked = ", without walking the batches through the model" if counts["walk_taken"] else ""
    return (
        f"cache: {counts['layers_taken']} layers taken from earlier runs{walked}, {counts['layers_solved']} "
        f"solved{hessians}; {format_bytes(counts['bytes_written'])} written"
    )
