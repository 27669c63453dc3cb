"""A tqdm progress bar over layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from gptq_plugin.quantize.options import Progress


@contextlib.contextmanager
def tqdm_progress() -> Iterator[Progress]:
    """Shows the bar for the length of the block; yields the function that advances it."""
    with tqdm(desc="GPTQ", unit="layer", dynamic_ncols=True) as bar:

        def advance(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what.rsplit(",", 1)[-1].strip()[-40:], refresh=False)
            bar.update(done - bar.n)

        yield advance
