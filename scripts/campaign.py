"""Attacks the package with seeded cases. An exception that is not ours, a hang, memory, wrong numbers: a fault.

python scripts/campaign.py                                    # all campaigns at full length, and docs/campaigns.md
python scripts/campaign.py checkpoints --cases 300 --seed 7   # one, or some, printed only
python scripts/campaign.py checkpoints --seed 7 --only 123    # a case once more
python scripts/campaign.py checkpoints --page                 # one at full length, and its row in docs/campaigns.md
python scripts/campaign.py checkpoints --rows FILE            # elsewhere: its row is added to a file,
python scripts/campaign.py --take FILE                        # and here put into docs/campaigns.md

Needs `pip install -e '.[test]'`. Runs on the CPU, offline, with --processes at a time. Ends with 1 if there are faults.
A campaign is a module of scripts/campaigns/ with a `CAMPAIGN` (see campaigns/campaign.py).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: no GPU, one thread a process, nothing of the network.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from campaigns.campaign import Campaign
from campaigns.processes import run
from campaigns.table import Result, commit, faults, into_page, table

NAMES = ("configurations", "command_lines", "checkpoints", "ckpt", "kills", "faults", "ranks", "soak")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "campaigns.md"


def fight(name: str, arguments: argparse.Namespace) -> Result:
    campaign: Campaign = importlib.import_module(f"campaigns.{name}").CAMPAIGN
    count = arguments.cases or (campaign.few if arguments.short else campaign.cases)
    if arguments.only is not None:
        count = arguments.only + 1
    cases = itertools.islice(enumerate(campaign.given(arguments.seed, count)), arguments.only or 0, None)
    result, start = Result(name, campaign.about, arguments.seed, arguments.commit), time.monotonic()
    in_time = itertools.takewhile(lambda _: time.monotonic() - start < arguments.seconds, cases)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=arguments.folder) as folder:
        made = Path(folder, "prepared")
        made.mkdir()
        campaign.prepare(made)
        for case in run(campaign, in_time, arguments.processes, Path(folder)):
            result.add(case)
            if case.faults:
                print(faults(name, arguments.seed, case), flush=True)
            if arguments.only is not None:
                print(case.what, *case.outcomes, sep="\n")
    result.seconds = time.monotonic() - start
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="as many as the campaign's long run when left out")
    parser.add_argument("--short", action="store_true", help="as many as the campaign's short run")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no case of a campaign after that long"
    )
    parser.add_argument("--only", type=int, help="the case of that number")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where cases have their folders")
    parser.add_argument("--page", action="store_true", help="put the rows into docs/campaigns.md")
    parser.add_argument("--rows", type=Path, help="add the rows to this file")
    parser.add_argument("--take", type=Path, nargs="+", help="run nothing, and put these files' rows into the page")
    parser.add_argument("--commit", default=commit(), help="for the rows, where the code is no git repository")
    arguments = parser.parse_args()
    if arguments.take:
        into_page(PAGE, [row for file in arguments.take for row in file.read_text(encoding="utf-8").splitlines()])
        return 0
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results = []
    for name in arguments.names or NAMES:
        results.append(fight(name, arguments))
        if arguments.rows:  # at once: a machine may be taken away
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(f"{results[-1].row}\n")
    print(table(results))
    if arguments.page or not (arguments.names or arguments.cases or arguments.short or arguments.rows):
        into_page(PAGE, [result.row for result in results])
    return int(any(result.faulty for result in results))


if __name__ == "__main__":
    sys.exit(main())
