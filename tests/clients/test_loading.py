"""What a model card tells each client's users about loading the export."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig
from gptq_plugin.checkpoint.formats.registry import FORMATS
from gptq_plugin.clients.loading import loading_sections
from gptq_plugin.clients.published import Published
from gptq_plugin.config import COMPRESSED
from gptq_plugin.report.model_card import ModelFacts
from gptq_plugin.report.report import QuantizeReport

from cards import SETTINGS, TASKLESS, card_of, report_of, section, snippet


def test_clients_have_their_sections_by_name_and_a_module_of_another_kind_has_none() -> None:
    def titles(facts: ModelFacts) -> list[str]:
        sections = loading_sections(Published(report_of((4, 128)), SETTINGS, facts))
        return [section.splitlines()[0] for section in sections]

    assert titles(TASKLESS) == ["### transformers", "### vLLM"]
    assert titles(dataclasses.replace(TASKLESS, loader=None)) == []


@pytest.mark.parametrize(
    ("widths", "changed", "because"),
    [
        ([(4, 128)], {"sym": False}, "symmetric grids only"),
        ([(4, 128)], {"dynamic": {"q": {"sym": False}}}, "symmetric grids only"),
        ([(2, 128)], {"bits": 2}, "2 or 3 bits"),
        ([(3, 128)], {"bits": 3}, "2 or 3 bits"),
        ([(4, 128), (3, 128)], {}, "2 or 3 bits"),
        ([(4, 128)], {"desc_act": True}, "desc_act=true"),
        ([(4, 128)], {"lm_head": True}, "output embedding"),
    ],
)
def test_vllm_is_refused_with_a_reason_and_no_command(
    widths: list[tuple[int, int]], changed: dict[str, Any], because: str
) -> None:
    said = section(card_of(report_of(*widths), **changed), "vLLM")
    assert said.startswith("vLLM does not load this checkpoint") and because in said and "```" not in said


@pytest.mark.parametrize(
    ("widths", "dtype", "command"),
    [
        ([(4, 128)], torch.float16, "vllm serve ."),
        ([(4, 128), (8, 32)], torch.bfloat16, "vllm serve ."),
        ([(8, -1)], torch.float32, "vllm serve . --dtype float16"),
    ],
)
def test_vllm_is_started_by_a_command_that_fits_the_dtype(
    widths: list[tuple[int, int]], dtype: torch.dtype, command: str
) -> None:
    card = card_of(report_of(*widths), ModelFacts("LlamaForCausalLM", "AutoModelForCausalLM", dtype))
    assert snippet(card, "vLLM") == command
    assert ("8-bit layers need a GPU" in card) is (8 in dict(widths))
    assert ("rounds the scales" in card) is (dtype == torch.bfloat16)
    assert ("Those it fuses" in section(card, "vLLM")) is (len(widths) > 1)


def test_a_language_model_without_its_tokenizer_is_served_with_one_from_elsewhere() -> None:
    for has, command in ((True, "vllm serve ."), (False, "vllm serve . --tokenizer FOLDER_OR_ID")):
        facts = ModelFacts("LlamaForCausalLM", "AutoModelForCausalLM", torch.float16, has_tokenizer=has)
        card = card_of(report_of((4, 128)), dataclasses.replace(facts, pipeline_tag="text-generation"))
        assert snippet(card, "vLLM") == command and ("not in this folder" in section(card, "vLLM")) is not has


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float16_is_not_advised_where_activations_exceed_it(dtype: torch.dtype) -> None:
    report, facts = report_of((4, 128)), ModelFacts("LlamaForCausalLM", "AutoModelForCausalLM", dtype)
    report.modules[0] = dataclasses.replace(report.modules[0], max_output=7e4)
    card = card_of(report, facts)
    assert snippet(card, "vLLM") == "vllm serve ." and "--dtype" not in card
    assert "in float16 layers.0 would overflow" in section(card, "vLLM")


def test_transformers_is_refused_with_a_reason_and_no_code() -> None:
    for widths, changed in (([(4, 128), (8, 128)], {}), ([(4, 32)], {}), ([(4, 128)], {"lm_head": True})):
        said = section(card_of(report_of(*widths), **changed), "transformers")
        assert said.startswith("transformers does not load this checkpoint") and "```" not in said
    facts = ModelFacts("GPT2LMHeadModel", "AutoModelForCausalLM", torch.float16, model_type="gpt2")
    for said in (
        card_of(report_of((4, 128)), facts),
        card_of(report_of((4, 128)), facts, checkpoint_format=COMPRESSED),
    ):
        assert "no quantized Conv1D" in section(said, "transformers") and "vllm serve" in said
    whole_rows = snippet(card_of(report_of((4, -1)), group_size=-1), "transformers")
    assert 'GPTQConfig(bits=4, backend="torch")' in whole_rows
    compile(whole_rows, "README.md", "exec")


@pytest.mark.parametrize(("bits", "taken"), [(4, True), (3, False)])
def test_compressed_tensors_needs_its_own_package(bits: int, taken: bool) -> None:
    config = QuantizeConfig(bits=bits, sym=False, checkpoint_format=COMPRESSED)
    facts = ModelFacts(name="LlamaForCausalLM", dtype=torch.float16, loader="AutoModelForCausalLM")
    text = card_of(QuantizeReport(config), facts, **FORMATS[COMPRESSED].settings({}, config))
    assert "pip install compressed-tensors" in text and "gptqmodel" not in text
    assert f"| `bits` | `{bits}` |" in text and "| `checkpoint_format` | `compressed-tensors` |" in text
    assert ("vllm serve ." in text) is taken
    assert ("it does not read layers of 2 or 3 bits" in text) is not taken
