"""Measures the perplexity of a causal language model over rows of tokens, and lets it continue a text.

``python -m gptq_plugin.apps.evaluate DIR --text FILES`` does both with a reloaded export. The commands run it in a
separate process, so that their results come from the files alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gptq_plugin.apps.output import output_never_fails, printable
from gptq_plugin.options.limited_files import check_sizes
from gptq_plugin.training.paired import Measured

_WINDOWS = "windows"


@torch.no_grad()
def mean_nll(network: nn.Module, windows: Tensor, batch_size: int = 4) -> Measured:
    """Mean negative log-likelihood in nats of every token after the first of its window, with the windows' own means.

    Perplexity is its exponential. The network is left in evaluation mode.

    Args:
        network: A causal language model, called with input_ids; its result has logits.
        windows: int64 [windows, positions].
        batch_size: Windows per forward.
    """
    network.eval()
    device = next(network.parameters()).device
    means: list[float] = []
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        logits = network(input_ids=batch).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        means += losses.double().mean(1).tolist()
    return Measured.mean(means, [1.0] * len(means))


@torch.no_grad()
def continue_text(network: Any, tokenizer: Any, start: Tensor, new_tokens: int = 32) -> str:
    """Returns the model's greedy continuation of `start` (int64 [positions])."""
    device = next(network.parameters()).device
    tokens = start[None].to(device)
    out = network.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(out[0, len(start) :], skip_special_tokens=True)
    return text


def evaluate_export(
    directory: Path, work_dir: Path, windows: Tensor, *, batch_size: int = 4, device: str = "cpu"
) -> dict[str, Any]:
    """Evaluates an export in a new process, from its files alone.

    Args:
        directory: The export.
        work_dir: Folder for the windows and the result.
        windows: int64 [windows, positions].
        batch_size: Windows per forward.
        device: Device of the other process.

    Returns:
        ``nll``, ``nlls`` (of the windows), ``prompt``, ``text``, and the seconds to load, evaluate and generate.

    Raises:
        RuntimeError: The process failed; the message holds the end of its output.
    """
    windows_file = work_dir / "windows.safetensors"
    result_file = work_dir / "evaluation.json"
    save_file({_WINDOWS: windows.contiguous()}, windows_file)
    command = [sys.executable, "-m", "gptq_plugin.apps.evaluate", str(directory)]
    command += ["--windows", str(windows_file), "--json", str(result_file)]
    command += ["--batch-size", str(batch_size), "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"the export could not be evaluated: {' '.join(command)}\n{done.stdout[-4000:]}")
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Loads an export, evaluates it, lets it continue a text, and prints both. Returns the exit status: 1 where
    the export or the text cannot be read.
    """
    options = _parser().parse_args(arguments)
    with output_never_fails():
        try:
            _evaluate(options)
        except (OSError, ValueError) as error:  # CheckpointError and DataError are ValueErrors
            print(printable(f"python -m gptq_plugin.apps.evaluate: {error}"), file=sys.stderr)
            return 1
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from gptq_plugin import load_quantized

    started = time.perf_counter()
    network = load_quantized(options.directory, device=options.device)
    loaded = time.perf_counter()
    check_sizes(options.directory)
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    windows = _windows(options, tokenizer)
    ready = time.perf_counter()
    nll = mean_nll(network, windows, options.batch_size)
    evaluated = time.perf_counter()
    prompt = windows[0, : options.prompt_tokens]
    text = continue_text(network, tokenizer, prompt, options.new_tokens)
    result = {
        "nll": nll,
        "nlls": nll.values,
        "perplexity": math.exp(nll),
        "windows": len(windows),
        "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
        "text": text,
        "seconds": {
            "load": loaded - started,
            "evaluate": evaluated - ready,
            "generate": time.perf_counter() - evaluated,
        },
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(f"perplexity {result['perplexity']:.4f} (mean NLL {nll:.5f}) over {len(windows)} windows")
    print(f"{result['prompt']!r} is continued by {text!r}")


def _windows(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    if options.windows:
        return load_file(options.windows)[_WINDOWS]
    from gptq_plugin.apps.documents import file_documents, texts
    from gptq_plugin.apps.rows import cut_rows

    documents = texts(file_documents(options.text, options.column), tokenizer)
    return cut_rows(documents, tokenizer, options.seq_len, limit=options.rows, purpose="evaluation text")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptq_plugin.apps.evaluate",
        description="Reload an exported model, measure its perplexity and let it write a few words.",
    )
    parser.add_argument("directory", help="the exported folder, or its id on the hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", help="text or jsonl files to evaluate on")
    source.add_argument("--windows", type=Path, help="a safetensors file with int64 `windows` [windows, positions]")
    parser.add_argument(
        "--column", default="text", help="the field that holds the text, or chat messages, in jsonl files"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window")
    parser.add_argument("--rows", type=int, default=None, help="windows at most (default: all)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in one forward")
    parser.add_argument("--prompt-tokens", type=int, default=24, help="tokens of the first window to continue")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
