"""Measures the loss of accuracy: `gptq-quantize` on pycode-29m beside AutoRound, llm-compressor and GPTQModel.

    python scripts/bench_accuracy.py                    # 4, 3 and 2 bits; about two minutes each on two cores
    python scripts/bench_accuracy.py quantizer.sym=false quantizer.checkpoint_format=gptq_v2 --bits 3
    python scripts/bench_accuracy.py quantizer=w3g128_best --bits 3

Needs ../shared (the model, its texts, and clients/gptq_ref.py). That independent reader dequantizes the exported files
in float32; the results are the mean negative log-likelihood on the first 200 windows of 512 tokens of eval.jsonl, and
the mean divergence from the float model, which scatters less (1 to 2 %, the other 12 % at 4 bits).
Calibration: the first 128 rows of 512 tokens of calib.jsonl. Arguments with a "=" are passed to gptq-quantize.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, TEXTS = SHARED / "models" / "pycode-29m", SHARED / "data" / "pycode"
# Loss above the float model, symmetric, group 128, the same rows, at their best (docs/benchmarks/accuracy.md).
PEERS = {
    4: {"AutoRound 0.16.1": 0.01092, "llm-compressor 0.14, imatrix_mse": 0.01484, "GPTQModel 7.6": 0.01873},
    3: {"AutoRound 0.16.1": 0.04498, "llm-compressor 0.14, imatrix_mse": 0.06341, "GPTQModel 7.6": 0.09963},
    2: {"AutoRound 0.16.1": 0.23541, "llm-compressor 0.14, imatrix_mse": 0.35656, "GPTQModel 7.6": 0.97697},
}
AUTOROUND = {4: 0.0153, 3: 0.0611, 2: 0.2836}  # its divergence


def windows(path: Path, count: int, length: int = 512) -> torch.Tensor:
    """The first rows of the concatenated documents, each after a BOS: int64 [count, length]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = []
    for line in path.open():
        ids += [
            tokenizer.bos_token_id,
            *tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"],
        ]
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: count * length]).reshape(count, length)


@torch.no_grad()
def compared(model: nn.Module, original: nn.Module, rows: torch.Tensor) -> tuple[float, float]:
    """Mean over tokens of the loss above the original model's, and of the divergence KL(original || model)."""
    above = divergence = 0.0
    for batch in rows.split(8):
        ours, theirs = (
            one(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1) for one in (model, original)
        )
        above += (theirs - ours).gather(2, batch[:, 1:, None]).double().sum().item()
        divergence += nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    count = rows.shape[0] * (rows.shape[1] - 1)
    return above / count, divergence / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("overrides", nargs="*", help="for gptq-quantize, such as quantizer.sym=false")
    arguments = parser.parse_intermixed_args()
    sys.path.insert(0, str(SHARED / "clients"))
    from gptq_ref import reference_model  # not ours: the independent reader

    rows = windows(TEXTS / "eval.jsonl", 200)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    print("loss above the float model's, and divergence from it:", flush=True)
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                Path(sys.executable).with_name("gptq-quantize"), f"model.name_or_path={MODEL}", "data=text",
                f"data.path={TEXTS / 'calib.jsonl'}", f"data.eval_path={TEXTS / 'eval.jsonl'}", "data.shuffle=false",
                "data.seq_len=512", "evaluate=false", f"quantizer.bits={bits}", f"export_dir={folder}/export",
                f"hydra.run.dir={folder}/run", *arguments.overrides,
            ]  # fmt: skip
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            above, divergence = compared(reference_model(f"{folder}/export"), original, rows)
        peers = "  ".join(
            f"{name} {loss:.5f} (ours {above / loss:.2f} of it)" for name, loss in PEERS.get(bits, {}).items()
        )
        if bits in AUTOROUND:
            peers += f"  KL of AutoRound {AUTOROUND[bits]:.4f} (ours {divergence / AUTOROUND[bits]:.2f} of it)"
        print(f"{bits} bits  +{above:.5f}  KL {divergence:.5f}  {seconds:.0f} s  {peers}", flush=True)


if __name__ == "__main__":
    main()
