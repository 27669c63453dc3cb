"""Every option is checked by its type and range, and a refusal names it, its value, and what is allowed."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeConfig, QuantizeModule
from gptq_plugin.errors import TargetError
from gptq_plugin.options import fields


class Odd:
    """Neither compared nor shown."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __fspath__(self) -> str:
        raise RuntimeError("no path")


WRONG: list[Any] = [
    Odd(), object(), 1 + 2j, b"bytes", numpy.array([1, 2]), torch.tensor([1.0, 2.0]), numpy.int64(4), {1, 2}, "",
    "a" * 10**5, "\0", "\udce9", float("nan"), float("inf"), 10**5000, -1e300, 2**63, [[[]]], [None], {None: None},
    {"a": {"b": {"c": 1}}}, (x for x in "ab"), int,
]  # fmt: skip
QUANTIZER = {"config", "offload_weights", "offload_activations", "exact_sums", "cache_dir", "cache_gb", "resume"}
RUN = {"forward", "nsamples", "device", "device_memory", "export_dir", "overwrite", "target", "progress"}
DATA = {"calibration", "mix", "tokenizer"}  # may be of many kinds; their own modules refuse what is none


def refusal(make: Any, **arguments: Any) -> str | None:
    """The message with which arguments are refused; None if they are taken."""
    try:
        make(**arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def said_well(name: str, message: str) -> None:
    assert name in message, message[:300]
    assert len(message) < 1500
    message.encode()  # can be printed


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(QuantizeConfig)])
def test_every_option_refuses_what_it_is_not_by_name_and_value(field: str) -> None:
    for value in WRONG:
        message = refusal(QuantizeConfig, **{field: value})
        if message is None:
            assert (field == "modules_to_not_convert" and value == "") or (field == "dynamic" and value in ("", {}))
            continue
        said_well(field, message)


@pytest.mark.parametrize("argument", sorted(QUANTIZER | {"unknown"}))
def test_a_quantizer_refuses_arguments_of_other_kinds(argument: str) -> None:
    for value in WRONG:
        message = refusal(QuantizeModule, **{argument: value})
        assert message is not None
        said_well(argument, message)


@pytest.mark.parametrize("argument", sorted(RUN))
def test_quantize_refuses_arguments_of_other_kinds_before_the_work(argument: str) -> None:
    def batches() -> Any:
        raise AssertionError("no batch was to be asked for")
        yield

    model = nn.Sequential(nn.Linear(32, 32))
    for value in WRONG:
        if argument in ("forward", "progress") and callable(value):
            continue
        if argument == "export_dir" and isinstance(value, str) and len(value) == 1 and value.isprintable():
            continue
        message = refusal(QuantizeModule(group_size=16).quantize, model=model, batches=batches(), **{argument: value})
        assert message is not None, (argument, value)
        said_well("cannot" if argument == "export_dir" and "cannot" in message else argument, message)


@pytest.mark.parametrize("callback", [GPTQCallback, GPTQTrainerCallback])
def test_callbacks_refuse_arguments_of_other_kinds(callback: Any) -> None:
    for argument in set(inspect.signature(callback).parameters) - {"quantizer"} - DATA:
        for value in WRONG:
            if callable(value) or (
                isinstance(value, str) and argument in ("export_dir", "log_artifacts", "weights", "module")
            ):
                continue
            message = refusal(callback, quantizer=QuantizeModule(), **{argument: value})
            if message is None:
                assert argument == "max_bits" and value in (2**63, 10**5000), (argument, type(value))
                continue
            said_well(argument, message)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_not_convert": "lm_head"}, r"a list of names, such as \['lm_head'\]; got 'lm_head'"),
        (
            {"batch_size": 2**63},
            r"batch_size must be a positive integer, at most 2147483647, or None \(8, .*\); got 9223372036854775808",
        ),
        (
            {"clip_ratios": [1e-300]},
            r"clip_ratios must be a list of 1 to 100 numbers in \[0.01, 1.25\]; got \[1e-300\]",
        ),
        ({"dynamic": ["a"]}, "dynamic must be a mapping from regular expressions to the fields they change; got"),
        ({"dynamic": {"a": 8}}, r"dynamic\['a'\] must be a mapping, or None"),
        ({"dynamic": {4: {"bits": 8}}}, "each key of dynamic must be a text that is not empty; got 4"),
        ({"dynamic": {"a": {"bits": 8, 3: 4}}}, r"dynamic\['a'\] must override some of bits"),
        ({"dynamic": {"a": {"clip_ratios": "11"}}}, r"dynamic\['a'\]: clip_ratios must be a list"),
    ],
)
def test_what_was_taken_and_meant_nothing_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QuantizeConfig(**options)


@pytest.mark.parametrize("text", ["- 1", "4", "a text", "{bits: [}", "{1: 2}", "!!python/object:os.system {}"])
def test_yaml_that_holds_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="configuration must be|unknown option"):
        QuantizeConfig.from_yaml(text)


def test_a_foreign_description_that_is_no_mapping_or_has_a_strange_meta_is_no_crash() -> None:
    with pytest.raises(ValueError, match="a GPTQ configuration must be a mapping; got 4"):
        QuantizeConfig.from_quantize_config(4)  # type: ignore[arg-type]
    for meta in (4, [1], {"gptq_plugin": 4}, None):
        assert QuantizeConfig.from_quantize_config({"bits": 4, "meta": meta}).bits == 4


VALID: dict[str, st.SearchStrategy[Any]] = {
    "bits": st.sampled_from([2, 3, 4, 8]),
    "group_size": st.sampled_from([-1, 8, 16, 32, 128, fields.LARGEST]),
    "sym": st.booleans(),
    "desc_act": st.booleans(),
    "static_groups": st.booleans(),
    "damp_percent": st.floats(0, 1, exclude_max=True),
    "damp_auto_increment": st.floats(0, 1, exclude_max=True),
    "method": st.sampled_from(["gptq", "best"]),
    "clip_ratios": st.lists(st.floats(0.01, 1.25), min_size=1, max_size=4),
    "clip_candidates": st.sampled_from([None, 1, 3, 100]),
    "scale_rounds": st.sampled_from([None, 0, 2]),
    "refit_rounds": st.sampled_from([None, 0, 2]),
    "asymmetric_alpha": st.sampled_from([None, 0, 0.5, 1.0]),
    "dynamic": st.sampled_from([None, {"0": {"bits": 8}}, {"-:0": {}}, {"2": {"sym": False}, ".*": {"bits": 2}}]),
    "modules_to_not_convert": st.sampled_from([None, (), ["2"]]),
    "model_seqlen": st.sampled_from([1, 2048, fields.LARGEST]),
    "nsamples": st.sampled_from([40, fields.LARGEST]),
    "batch_size": st.sampled_from([1, 3, fields.LARGEST]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "compressed-tensors"]),
}


@settings(deadline=None, max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.fixed_dictionaries({}, optional=VALID))
def test_everything_that_is_accepted_runs(options: dict[str, Any]) -> None:
    try:
        config = QuantizeConfig(**options)
    except ValueError as error:
        assert "compressed-tensors" in str(error)  # combinations that no client reads
        return
    left = options.get("modules_to_not_convert") or ()
    assert QuantizeConfig.from_yaml(config.to_yaml()) == config
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    try:
        QuantizeModule(config).quantize(model, list(torch.randn(40, 32).split(1)))
    except TargetError as error:  # nothing is left to quantize, or a rule is for what is left float
        assert left and ("modules_to_not_convert" in str(error))
        return
    assert torch.isfinite(model(torch.randn(4, 32))).all()


def test_a_value_is_shown_short_and_by_its_type_where_it_cannot_be_shown() -> None:
    assert fields.shown("a" * 500) == "'" + "a" * 119 + "… (str)"
    assert fields.shown(Odd()) == "<Odd>" and fields.shown(10**5000) == "<int>"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (fields.one_of(1, "a"), [1, "a"], [True, 1.0, "b", Odd()]),
        (fields.integer(1, also=-1), [-1, 1, fields.LARGEST], [0, -2, True, 1.0, fields.LARGEST + 1]),
        (fields.share(), [0, 0.5], [1, -0.1, True, float("nan"), "0"]),
        (fields.above(0), [1e-9, 10**400], [0, float("inf"), float("nan"), True]),
        (fields.optional(fields.SWITCH, "x"), [None, True], [0, "true"]),
        (fields.list_of(fields.NAME, "x", least=1), [["a"], ("a", "b")], [[], "ab", {"a"}, [""], [1], b"a", range(2)]),
        (fields.PATH, ["a", Path("b")], ["", b"a", 4, None, Odd()]),
        (fields.FUNCTION, [len, lambda: 0], [None, 4]),
    ],
)
def test_kinds_take_their_values_and_no_others(kind: fields.Kind, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        kind.check("name", value)
    for value in bad:
        with pytest.raises(ValueError, match="name must be "):
            kind.check("name", value)


def test_values_that_hold_very_many_are_not_walked_to_be_shown() -> None:
    doubled: list[Any] = []
    for _ in range(60):
        doubled = [doubled, doubled]
    itself: dict[str, Any] = {}
    itself["a"] = [itself]
    assert fields.shown(doubled) == "<list of 2>" and fields.shown(["0"] * 10**6) == "<list of 1000000>"
    assert fields.shown(itself) == "<dict of 1>" and fields.shown({"a": [1, (2,)]}) == "{'a': [1, (2,)]}"


@pytest.mark.parametrize("function", [len, lambda done: None, lambda a, b, *, c: None])
def test_a_progress_that_does_not_take_its_three_values_is_refused_before_the_work(function):
    with pytest.raises(ValueError, match="progress must be a function that takes 3 values in a row"):
        QuantizeModule(group_size=16).quantize(nn.Linear(32, 8), [torch.randn(8, 32)], progress=function)
    for right in (print, max, lambda *_: None, lambda a, b, c, d=0: None):
        assert fields.function_of(3).accepts(right)
