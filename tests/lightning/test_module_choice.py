"""Which module of a LightningModule is quantized; whole runs are in tests/lightning/test_callback.py."""

from __future__ import annotations

import pytest
from torch import nn

from gptq_plugin.errors import TargetError
from gptq_plugin.lightning.module_choice import choose_module

from lightning_runs import Contains, Holds, Is, Plain, llama


@pytest.mark.parametrize(("kind", "where"), [(Holds, "model"), (Is, ""), (Contains, "net.backbone.0"), (Plain, "")])
def test_by_default_it_is_the_transformers_model_or_else_all_of_it(kind, where):
    module = kind()
    assert choose_module(module, None, print) is module.get_submodule(where)


def test_a_name_chooses_any_submodule_and_the_empty_one_the_whole_module():
    module = Contains()
    assert choose_module(module, "", pytest.fail) is module
    assert choose_module(module, "net.head", pytest.fail) is module.net["head"]


def test_a_name_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(TargetError, match="module='net.body' is not a submodule of Contains, which has net"):
        choose_module(Contains(), "net.body", pytest.fail)


def test_of_several_models_one_has_to_be_named():
    module = Holds()
    module.teacher = llama()
    with pytest.raises(TargetError, match=r"models \(model, teacher\): choose one with module=\.\.\., or all of it"):
        choose_module(module, None, pytest.fail)
    assert choose_module(module, "teacher", pytest.fail) is module.teacher


def test_parameters_outside_the_model_are_named_in_a_warning():
    module, warnings = Contains(), []
    module.net["more"] = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    choose_module(module, None, warnings.append)
    outside = "net.head.weight, net.head.bias, net.more.0.weight, net.more.0.bias of Contains"  # four are enough
    (warning,) = warnings
    assert f"'net.backbone.0' is quantized and exported; {outside} are outside it" in warning
    choose_module(Holds(), None, pytest.fail)
    choose_module(module, "net.backbone.0", pytest.fail)
