"""Exports in the hands of real clients: transformers (through optimum) and GPTQModel.

The environment and the checks are not part of this repository: `--client-env` and `--clients` say where they
are (scripts/check_clients.sh makes the former); without them these tests are skipped. Weights are random, and
scaled so that an off-by-one in a single layer's zeros shows in the logits; the reference is an independent
reader.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.export import export_model

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

CASES = {
    "4 bits v1": QuantizeConfig(),
    "4 bits v2": QuantizeConfig(checkpoint_format="gptq_v2"),
    "4 bits asymmetric v2": QuantizeConfig(sym=False, checkpoint_format="gptq_v2"),
    "8 bits": QuantizeConfig(bits=8),
    "3 bits": QuantizeConfig(bits=3),
    "2 bits": QuantizeConfig(bits=2, group_size=32),
    "layers left float": QuantizeConfig(modules_to_not_convert=("self_attn.v_proj", "layers.1.mlp.down_proj")),
}


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    """run(script, *arguments): a check script in the clients' environment."""
    python = Path(request.config.getoption("--client-env")) / "bin" / "python"
    clients = Path(request.config.getoption("--clients"))
    if not python.exists():
        pytest.skip(f"no client environment at {python.parents[1]}: run scripts/check_clients.sh or give --client-env")
    if not (clients / "gptq_ref.py").exists():
        pytest.skip(f"no client checks at {clients}: give --clients")

    def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [str(python), str(clients / script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)

    return run


def loud_llama() -> Any:
    """A random Llama of which every layer contributes O(1) to the residual stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 0.5 if "embed" in name else (3 if "lm_head" in name else 1) * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape) * scale)
    return model.eval()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(2048)}, unk_token="t0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    )


@pytest.fixture(scope="session")
def exported(run: Run, rtn: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """exported(case): (folder of the export, file of the reference logits), made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def export(case: str) -> tuple[Path, Path]:
        if case not in made:
            place = tmp_path_factory.mktemp("client")
            model = rtn(loud_llama(), CASES[case])
            folder = export_model(model, place / "export", CASES[case], tokenizer=tokenizer())
            result = run("gptq_ref.py", folder, place / "reference.safetensors")
            assert result.returncode == 0, result.stderr[-3000:]
            made[case] = folder, place / "reference.safetensors"
        return made[case]

    return export


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_the_reference_computes(case: str, exported: Any, run: Run) -> None:
    folder, reference = exported(case)
    result = run(
        "check_transformers.py",
        *(folder, "--ref", reference, "--dtype", "float32", "--backend", "torch", "--tol", 0.03),
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize("case", CASES)
def test_gptqmodel_computes_what_the_reference_computes(case: str, exported: Any, run: Run) -> None:
    folder, reference = exported(case)
    result = run("check_gptqmodel.py", folder, "--ref", reference, "--dtype", "float16", "--tol", 0.25)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize("kind", ["zeros1layer", "scale1layer1.05"])
def test_the_checks_fail_on_an_export_with_one_spoiled_layer(
    kind: str, exported: Any, run: Run, tmp_path: Path
) -> None:
    folder, reference = exported("4 bits v1")
    assert run("corrupt.py", folder, tmp_path / "bad", kind).returncode == 0
    result = run(
        "check_transformers.py",
        *(tmp_path / "bad", "--ref", reference, "--dtype", "float32", "--backend", "torch", "--tol", 0.03),
    )
    assert result.returncode == 1, result.stdout
