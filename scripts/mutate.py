"""Mutation tests: small changes to the source, one at a time, each of which some test should notice.

python scripts/mutate.py                                        # all modules, and docs/mutation.md
python scripts/mutate.py gptq.grid walk.hessian                 # some, printed only
python scripts/mutate.py gptq.grid --results part1.json         # in several runs, kept beside what the file holds,
python scripts/mutate.py --page part1.json part2.json           # and the page from all of them

Needs `pip install -e '.[test,mutation]'`. Runs on the CPU, offline, with --processes at a time. Ends with 1 where fewer
than 95 % of the mutants die, or where one survives without a reason in scripts/mutation/reasons.yaml.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before torch is imported: no GPU, one thread a process, nothing of the network, no examples of hypothesis kept.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent / "mutation"))

from mutants import mutants_of
from report import Result, Survivor, are_good, keep, machine, page, read, summary, told
from runner import baseline, outcomes
from targets import REPOSITORY, Target, targets

DOCS = REPOSITORY / "docs" / "mutation.md"


def run(target: Target, processes: int, longest: float) -> Result:
    before = baseline(target)
    mutants = mutants_of(target.file.read_text(encoding="utf-8"))
    counts, survivors = {"killed": 0, "timeout": 0, "survived": 0}, []
    for mutant, outcome in outcomes(target, mutants, processes, before, longest):
        counts[outcome] += 1
        if outcome == "survived":
            survivors.append(Survivor(*mutant.described()))
            print(told(target.short, survivors[-1]), flush=True)
    return Result(
        target.short, machine(processes), before.seconds, counts["killed"], counts["timeout"], sorted(survivors)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="as gptq.grid; all when left out")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--longest", type=float, default=float("inf"), help="leave out tests that take longer, in seconds"
    )
    parser.add_argument("--results", type=Path, help="a file to keep the results in")
    parser.add_argument("--page", type=Path, nargs="+", help="write docs/mutation.md from such files, and run nothing")
    arguments = parser.parse_args()
    by_name = {target.short: target for target in targets()}
    unknown = set(arguments.modules) - set(by_name)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    if arguments.page:
        kept = {name: result for file in arguments.page for name, result in read(file).items()}
        results = [kept[name] for name in by_name if name in kept]
    else:
        no_examples_kept()
        results = []
        for name in arguments.modules or by_name:
            results.append(run(by_name[name], arguments.processes, arguments.longest))
            print(summary(results[-1]), flush=True)
            if arguments.results:
                keep(arguments.results, results[-1])
    if arguments.page or not arguments.modules:
        DOCS.write_text(page(results, by_name), encoding="utf-8")
    return int(not are_good(results))


def no_examples_kept() -> None:
    """Hypothesis tries the same examples every time, keeps none, and does not shrink those that fail."""
    from hypothesis import Phase, settings

    settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), database=None, derandomize=True)
    settings.load_profile("mutation")


if __name__ == "__main__":
    sys.exit(main())
