"""Walks, quantizes, exports, reloads and compares every model type of transformers that can be built.

python scripts/sweep_architectures.py                          # all, and docs/architectures.md
python scripts/sweep_architectures.py --types llama,bert       # some, printed only
python scripts/sweep_architectures.py --mappings ctc --out results.json
python scripts/sweep_architectures.py --types bit --beside all.json   # these once more, and the table with the others
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "sweep"))

from pool import run

DOCS = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"


def examine_quietly(mapping: str, kind: str) -> dict[str, object]:
    import torch
    import transformers
    from one import examine

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    return examine(mapping, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="model types, with commas; all when left out")
    parser.add_argument("--mappings", default="", help="auto mappings, with commas; all when left out")
    parser.add_argument("--seconds", type=float, default=90, help="a type may take")
    parser.add_argument("--out", type=Path, help="all results as JSON")
    parser.add_argument("--beside", type=Path, help="results as JSON of types that are not run; the table has all")
    parser.add_argument("--docs", type=Path, help="where the table goes; docs/architectures.md when all types run")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from building import rows
    from table import line, page, summary

    types, mappings = (set(filter(None, given.split(","))) for given in (args.types, args.mappings))
    jobs = [r for r in rows() if (not mappings or r[0] in mappings) and (not types or r[1] in types)]
    results = []
    for result in run(
        examine_quietly,
        jobs,
        args.seconds,
        lambda job, why: {"mapping": job[0], "type": job[1], "stage": "crash", "error": why, "notes": []},
    ):
        results.append(result)
        print(line(result), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1, default=str))
    if args.beside:
        of_all = {(r["mapping"], r["type"]): r for r in [*json.loads(args.beside.read_text()), *results]}
        results = [of_all[job] for job in rows() if job in of_all]
    print(summary(results))
    docs = args.docs or (None if (types or mappings) and not args.beside else DOCS)
    if docs:
        docs.write_text(page(results, "python scripts/sweep_architectures.py"))


if __name__ == "__main__":
    main()
