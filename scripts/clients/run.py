"""run.py [--envs DIR] [--out DIR] [--docs FILE]: runs every case with every client, and writes docs/clients.md.

Runs in this project's environment; the clients run in theirs. Exit status 1 if a client's result is not the expected
one (`cases.py`), also if it loads what it should refuse, or if it passes a spoiled copy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cases import CASES, LOADS, SPOILED
from corrupt import corrupt
from reference import reference_of

HERE = Path(__file__).resolve().parent
CLIENTS = ("transformers", "gptqmodel", "vllm")
# {lane: (environment, check)}. transformers has two: GPTQ needs optimum and GPTQModel, compressed-tensors its package.
LANES = {
    "vllm": ("vllm", "check_vllm.py"),
    "transformers": ("gm", "check_transformers.py"),
    "gptqmodel": ("gm", "check_gptqmodel.py"),
    "transformers-ct": ("llmc", "check_transformers.py"),
}

Result = dict[str, Any]


def lane(client: str, case: str) -> str:
    """The lane, an environment and a check, that runs a case for a client."""
    return f"{client}-ct" if client == "transformers" and case.startswith("ct-") else client


def check(name: str, folders: list[Path], envs: Path, logs: Path) -> dict[str, Result]:
    """Runs one lane over its folders: {folder's name: result}. The client's output goes to logs/LANE.log."""
    environment, script = LANES[name]
    log = logs / f"{name}.log"
    log.unlink(missing_ok=True)
    results: dict[str, Result] = {}
    left = folders
    while left:
        with log.open("a") as file:
            ended = subprocess.run(
                [str((envs / environment / "bin" / "python").absolute()), str(HERE / script), *map(str, left)],
                stdout=file,
                stderr=subprocess.STDOUT,
                # Clients must not see this project's environment.
                env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"},
                cwd=logs,
                check=False,
            )
        results |= read_results(log)
        left = [folder for folder in folders if folder.name not in results]
        if left:  # the process ended at the first of these: continue with the others
            print(f"{name}: {left[0].name} ended the process with status {ended.returncode}", flush=True)
            results[left[0].name] = {
                "folder": left[0].name,
                "passed": False,
                "difference": None,
                "error": f"the process ended with status {ended.returncode}",
                "tolerance": None,
                "seconds": 0,
                "versions": {},
                "note": None,
            }
            left = left[1:]
    print(f"{name}: {len(results)} folders, {sum(r['seconds'] for r in results.values()):.0f} s", flush=True)
    return results


def read_results(log: Path) -> dict[str, Result]:
    """Parses a check's output: {folder's name: result}."""
    lines = re.findall(r"^RESULT (.*)$", log.read_text(errors="replace"), re.MULTILINE)
    return {result["folder"]: result for result in map(json.loads, lines)}


def judged(result: Result | None, expected: str) -> str | None:
    """The difference between a result and the expected one, or None."""
    if result is None:
        return "no result: see the log"
    if expected == LOADS:
        return None if result["passed"] else f"should load; {said(result)}"
    if result["error"] is None:
        return f"should refuse it with {expected!r}; {said(result)}"
    return None if re.search(expected, result["error"]) else f"should refuse it with {expected!r}; {said(result)}"


def said(result: Result) -> str:
    """Describes a result."""
    if result["error"]:
        return result["error"]
    return f"differs by {result['difference']:.3g} (limit {result['tolerance']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=HERE.parents[2] / "envs")
    parser.add_argument("--out", type=Path, help="an empty folder for the checkpoints and logs")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs" / "clients.md")
    options = parser.parse_args()
    if options.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return everything(options.envs, Path(folder), options.docs)
    options.out.mkdir(parents=True, exist_ok=True)
    return everything(options.envs, options.out.resolve(), options.docs)


def everything(envs: Path, out: Path, docs: Path) -> int:
    """Makes the checkpoints, runs the clients, writes the table, and returns the exit status."""
    begun = time.perf_counter()
    run = {**os.environ, "OMP_NUM_THREADS": "1"}
    names = [case.name for case in CASES if not (out / case.name).exists()]
    if names:
        halves = [names[::2], names[1::2]]
        made = [
            subprocess.Popen([sys.executable, HERE / "make.py", out, *half], env=run, stderr=subprocess.DEVNULL)
            for half in halves
            if half
        ]
        if max(process.wait() for process in made):  # wait for all before reporting
            print("an export failed: run scripts/clients/make.py")
            return 1
    folders = {case.name: out / case.name for case in CASES}
    subprocess.run([sys.executable, HERE / "reference.py", *folders.values()], env=run, check=True)
    for spoiled in SPOILED:
        folder = folders[spoiled.name] = out / spoiled.name
        if not folder.exists():
            corrupt(out / spoiled.case, folder, spoiled.kind)
        reference_of(folder).write_bytes(reference_of(out / spoiled.case).read_bytes())
    print(f"checkpoints and references: {time.perf_counter() - begun:.0f} s", flush=True)

    todo: dict[str, list[Path]] = {name: [] for name in LANES}
    for item in (*CASES, *SPOILED):
        for client in item.clients if item in SPOILED else item.expected:
            todo[lane(client, item.name)].append(folders[item.name])
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(todo, pool.map(lambda name: check(name, todo[name], envs, out), todo)))

    wrong = unexpected(results)
    docs.parent.mkdir(exist_ok=True)
    docs.write_text(page(results, wrong), encoding="utf-8")
    print(f"{docs}, after {time.perf_counter() - begun:.0f} s")
    print("\n".join(wrong) or "every client did what is expected of it")
    return int(bool(wrong))


def unexpected(results: dict[str, dict[str, Result]]) -> list[str]:
    """A sentence for every result that `cases` does not expect."""
    wrong = []
    for case in CASES:
        for client, expected in case.expected.items():
            problem = judged(results[lane(client, case.name)].get(case.name), expected)
            if problem:
                wrong.append(f"{client}, {case.name}: {problem}")
    for spoiled in SPOILED:
        for client in spoiled.clients:
            result = results[lane(client, spoiled.name)].get(spoiled.name)
            # Wrong values must be found as such, not hidden by another error.
            told = None if result is None else result["error"]
            seen = "missing" in (told or "") if spoiled.kind == "missing" else told is None
            if result is None or result["passed"] or not seen:
                how = "no result: see the log" if result is None else said(result)
                wrong.append(f"{client}, {spoiled.name}: the check should fail on the spoiled layer; {how}")
    return wrong


# --- docs/clients.md ----------------------------------------------------------------------------------------


def page(results: dict[str, dict[str, Result]], wrong: list[str]) -> str:
    """The table of results, in Markdown."""
    reasons: dict[str, int] = {}
    rows = []
    for case in CASES:
        cells = []
        for client in CLIENTS:
            result = results[lane(client, case.name)].get(case.name)
            cells.append(cell(result, reasons) if client in case.expected else "not run")
        shown = ", ".join(f"{key}={value!r}" for key, value in case.config.items() if key != "checkpoint_format")
        form = case.config.get("checkpoint_format", "gptq")
        extra = f", files of {case.shard:,} bytes" if case.shard else ""
        extra += f", finished ({case.finish})" if case.finish != "none" else ""
        rows.append(f"| {case.architecture} | {form} | `{shown or 'defaults'}`{extra} | {' | '.join(cells)} |")
    spoiled = []
    for item in SPOILED:
        for client in item.clients:
            result = results[lane(client, item.name)].get(item.name)
            seen = "no result" if result is None else cell(result, reasons)
            spoiled.append(f"| {item.case} | {item.kind} | {client} | {seen} |")
    versions, notes = [], []
    for name, (environment, _) in LANES.items():
        result = next((result for result in results[name].values() if result["versions"]), None)
        if result is not None:
            told = ", ".join(f"{package} {v}" for package, v in result["versions"].items() if v != "none")
            versions.append(f"- {name} (environment `{environment}`): {told}; tolerance {result['tolerance']}")
            if result["note"]:
                notes.append(f"- \\* {name}: {result['note']}.")
    failed = ["", "**Not as expected:**", "", *(f"- {line[:300]}" for line in wrong)] if wrong else []
    return "\n".join(
        [
            "# What real clients do with our exports",
            "",
            "Written by `scripts/check_clients.sh`; do not edit. Small random models (`scripts/clients/make.py`) are "
            "quantized, exported and loaded by each client on a CPU. A number is the largest difference of a "
            "log-probability from an independent reader's (`scripts/clients/reference.py`, float32). Numbers in "
            "brackets are the refusals below. On GPUs clients take more, or less: `gptq_plugin/clients/`.",
            "",
            *versions,
            *notes,
            *failed,
            "",
            "| model | checkpoint_format | QuantizeConfig | " + " | ".join(CLIENTS) + " |",
            "|---|---|---|" + "---|" * len(CLIENTS),
            *rows,
            "",
            "## Refusals",
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
            "",
            "## Spoiled copies",
            "",
            "One layer is wrong: its zeros one more, its scales 5 % larger, its rows exchanged, or its codes missing. "
            "No client's check may pass these.",
            "",
            "| case | wrong | client | result |",
            "|---|---|---|---|",
            *spoiled,
            "",
        ]
    )


def cell(result: Result | None, reasons: dict[str, int]) -> str:
    """A table's cell for a result; reasons of refusals are numbered."""
    if result is None:
        return "no result"
    if result["error"]:
        first = result["error"].split(" <- ")[0]
        first = re.sub(r"1 validation error for \w+\s+Value error, ", "", first).split(" [type=")[0]
        reason = " ".join(re.sub(r"/\S+/", "", first).split())[:240].replace("|", "\\|")
        return f"refuses [{reasons.setdefault(reason, len(reasons) + 1)}]"
    figure = f"{result['difference']:.2g}"
    star = "\\*" if result["note"] else ""
    return f"loads{star}, {figure}" if result["passed"] else f"**differs, {figure}**"


if __name__ == "__main__":
    sys.exit(main())
