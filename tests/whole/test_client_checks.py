"""The independent reader and the spoiled copies with which scripts/check_clients.sh judges real clients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.export.export import export_model

from paths import REPOSITORY

FORMATS = {
    "gptq": QuantizeConfig(bits=4, group_size=32, dynamic={r".*\.down_proj": {"bits": 3}}),
    "gptq_v2": QuantizeConfig(bits=2, group_size=32, sym=False, checkpoint_format="gptq_v2"),
    "compressed-tensors": QuantizeConfig(
        bits=4,
        group_size=32,
        sym=False,
        checkpoint_format="compressed-tensors",
        dynamic={r".*\.down_proj": {"bits": 3, "group_size": -1, "sym": True}},
    ),
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """scripts/clients, whose files import each other by name, on the path."""
    sys.path.insert(0, str(REPOSITORY / "scripts" / "clients"))
    yield
    sys.path.remove(str(REPOSITORY / "scripts" / "clients"))


@pytest.fixture(scope="module")
def exported(rtn: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """exported(checkpoint_format): an export's folder."""
    made: dict[str, Path] = {}

    def export(form: str) -> Path:
        if form not in made:
            from transformers import LlamaConfig, LlamaForCausalLM

            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=512,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.1,
            )
            model = rtn(LlamaForCausalLM._from_config(config, dtype=torch.float16).eval(), FORMATS[form])
            made[form] = export_model(model, tmp_path_factory.mktemp("clients") / "export", FORMATS[form])
        return made[form]

    return export


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("form", FORMATS)
def test_the_independent_reader_agrees_with_load_quantized(form: str, exported: Callable[[str], Path]) -> None:
    from reference import reference_logits

    folder = exported(form)
    tokens, theirs = reference_logits(folder)
    with torch.no_grad():
        ours = load_quantized(folder, dtype=torch.float32)(input_ids=torch.tensor([tokens])).logits[0]
    assert theirs.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("form, kind", [(f, k) for f in FORMATS for k in ("zeros", "scales", "rows")])
def test_a_spoiled_copy_reads_as_another_model(
    form: str, kind: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    from corrupt import LAYER, corrupt
    from reference import float_state

    folder = exported(form)
    name = corrupt(folder, tmp_path / "bad", kind)
    good, bad = float_state(folder), float_state(tmp_path / "bad")
    assert name.startswith(LAYER)
    assert [key for key in good if not torch.equal(good[key], bad[key])] == [f"{LAYER}.quantized"]


@pytest.mark.usefixtures("scripts")
def test_a_copy_without_a_layers_codes_is_refused_by_the_reader(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    from corrupt import corrupt
    from reference import reference_logits

    corrupt(exported("gptq"), tmp_path / "bad", "missing")
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        reference_logits(tmp_path / "bad")


@pytest.mark.usefixtures("scripts")
def test_a_result_is_judged_in_both_directions() -> None:
    from run import judged

    passed = {"passed": True, "error": None, "difference": 0.01, "tolerance": 0.03}
    differs = {"passed": False, "error": None, "difference": 1.0, "tolerance": 0.03}
    refused = {"passed": False, "error": "ValueError: bits", "difference": None, "tolerance": 0.03}
    assert judged(passed, "loads") is None and judged(refused, "bits") is None
    for result, expected in ((None, "loads"), (differs, "loads"), (refused, "loads"), (passed, "bits"), (refused, "x")):
        assert judged(result, expected) is not None
