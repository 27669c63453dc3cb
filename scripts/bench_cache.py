"""Times what `cache_dir` saves: runs of pycode-29m with a folder that earlier ones have filled, and without.

    python scripts/bench_cache.py                          # 32 rows of 512 tokens, one thread: half an hour
    python scripts/bench_cache.py --rows 128 --device cuda --method gptq

Needs ../shared. Each line is a run behind the same two at 4 bits, of which the first filled an empty folder: the same
again, again at 3 bits, with two layers of block 6 at 8 bits (as an escalation gives them), and with the other method.
Every result is compared, bit for bit, with that of the run without a folder. On a CPU the seconds are its own, which
other users of the machine change little.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_plugin import QuantizeModule

sys.path.insert(0, str(Path(__file__).parent))
from bench_accuracy import MODEL, TEXTS, windows

ESCALATED = {r"model\.layers\.6\.(self_attn\.o_proj|mlp\.down_proj)": {"bits": 8}}


def quantized(model: nn.Module, rows: torch.Tensor, folder: str | None, **options: Any) -> tuple[float, Any, Any]:
    """Seconds, the report and the state of a run."""
    model = copy.deepcopy(model)
    clock = time.process_time if next(model.parameters()).device.type == "cpu" else time.perf_counter
    quantizer = QuantizeModule(group_size=128, nsamples=len(rows), model_seqlen=512, cache_dir=folder, **options)
    started = clock()
    report = quantizer.quantize(model, list(rows))
    return clock() - started, report, model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", nargs="+", default=["gptq", "best"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = windows(TEXTS / "calib.jsonl", arguments.rows)
    model = AutoModelForCausalLM.from_pretrained(MODEL).to(arguments.device)
    if arguments.device != "cpu":
        quantized(model, rows, None)  # compiles the kernels
    print("| method | run | without, s | with, s | layers taken | solved | MB written |")
    print("|---|---|---|---|---|---|---|")
    for method in arguments.method:
        other = next(one for one in ("best", "gptq") if one != method)
        runs: dict[str, dict[str, Any]] = {
            "the first": {"method": method},
            "the same again": {"method": method},
            "3 bits": {"method": method, "bits": 3},
            "two layers of block 6 at 8 bits": {"method": method, "dynamic": ESCALATED},
            f"`{other}`": {"method": other},
        }
        plain: dict[str, tuple[float, Any, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, options in runs.items():
                if repr(options) not in plain:
                    plain[repr(options)] = quantized(model, rows, None, **options)
                without, _, state = plain[repr(options)]
                seconds, report, kept = quantized(model, rows, folder, **options)
                assert all(torch.equal(value, kept[key]) for key, value in state.items()), name
                taken = report.cache
                cells = (f"`{method}`", name, f"{without:.1f}", f"{seconds:.1f}")
                counts = (taken["layers_taken"], taken["layers_solved"], f"{taken['bytes_written'] / 1e6:.0f}")
                print(f"| {' | '.join(map(str, (*cells, *counts)))} |", flush=True)


if __name__ == "__main__":
    main()
