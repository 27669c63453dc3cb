"""Options of the old libraries: ignored with the reason, refused with the remedy, unknown with the nearest name."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest

from gptq_plugin.autogptq import (
    AutoGPTQForCausalLM,
    BaseGPTQForCausalLM,
    BaseQuantizeConfig,
    GPTQQuantizer,
    load_quantized_model,
    options,
)
from gptq_plugin.autogptq.options import sort_out

from paths import REPOSITORY

IGNORED = {"use_triton": "no kernels to choose", "use_qigen": "no kernels to choose", "offload": "no room"}
REFUSED = {"use_safetensors": ((True, None), "leave it out")}


def load(folder: str, device: str = "cpu", **options: Any) -> dict[str, Any]:
    return sort_out(load, options, ignored=IGNORED, refused=REFUSED, forwarded=("revision", "token"))


def test_ignored_options_are_one_warning_with_the_reasons_at_the_line_that_gives_them() -> None:
    with pytest.warns(UserWarning) as caught:
        load("out", use_triton=False, offload=True, use_qigen=True)
    assert [str(one.message) for one in caught] == [
        "load ignores use_triton, use_qigen (no kernels to choose); offload (no room)"
    ]
    assert caught[0].filename == __file__


def test_an_unknown_option_is_refused_with_the_nearest_of_all_names() -> None:
    for unknown, near in (("devise", "device"), ("use_tritom", "use_triton"), ("revison", "revision")):
        with pytest.raises(ValueError, match=rf"load: unknown option '{unknown}': did you mean '{near}'\?"):
            load("out", **{unknown: 1})
    with pytest.raises(ValueError, match="unknown option 'xyzzy': It takes folder, device, revision, token$"):
        load("out", xyzzy=1)


def test_a_refused_option_may_have_its_accepted_values_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("out", use_safetensors=True) == {}
        assert load("out", use_safetensors=None) == {}
    with pytest.raises(ValueError, match="load does not take use_safetensors=False: leave it out"):
        load("out", use_safetensors=False)


def test_forwarded_options_are_given_back_and_the_others_are_not() -> None:
    with pytest.warns(UserWarning):
        assert load("out", revision="v1", use_triton=True, token="x") == {"revision": "v1", "token": "x"}


def test_nothing_is_warned_of_when_an_option_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="unknown option"):
            load("out", use_triton=True, devise=1)


def test_every_option_is_documented() -> None:
    page = (REPOSITORY / "docs" / "reference" / "autogptq.md").read_text(encoding="utf-8")
    tables = [getattr(options, name) for name in vars(options) if name.isupper() and name[0] != "_"]
    calls = [
        AutoGPTQForCausalLM.from_pretrained,
        AutoGPTQForCausalLM.from_quantized,
        BaseGPTQForCausalLM.quantize,
        BaseQuantizeConfig,
        GPTQQuantizer,
        load_quantized_model,
    ]
    names = {name for table in tables for name in table}
    names |= {
        one.name
        for call in calls
        for one in inspect.signature(call).parameters.values()
        if one.default is not one.empty
    }
    assert len(tables) >= 8 and len(names) > 60
    assert [name for name in sorted(names) if not re.search(f"`{name}[`=]", page)] == []
