"""Experts that are called at once: the values of transformers' forward, which takes what has gradients or biases.

Without a GPU stand-ins sort and add up.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import weakref
from typing import Any

import pytest
import torch
from gptq_plugin.kernels import plain_rows
from gptq_plugin.kernels.product import routing
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gptq_plugin.memory.weights import Weights
from gptq_plugin.model import experts_served
from gptq_plugin.model.experts import unfused

from forked_python import python

EXPERTS = 6


def sort_pairs(chosen: torch.Tensor, experts: int) -> routing.Sorted:
    order = chosen.flatten().sort(stable=True).indices
    counts = torch.bincount(chosen.flatten(), minlength=experts + 1)[:experts]
    return routing.Sorted(counts.cumsum(0).int(), (order // chosen.shape[1]).int(), order.argsort().int())


def combine(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y[places.long()].view(*weights.shape, -1) * weights[..., None]).sum(1)


@pytest.fixture
def taken(monkeypatch):
    """The numbers of pairs that were sorted by the stand-in."""
    found: list[int] = []

    def noted(chosen: torch.Tensor, experts: int) -> routing.Sorted:
        found.append(chosen.numel())
        return sort_pairs(chosen, experts)

    monkeypatch.setattr(experts_served, "_on_gpu", lambda x: True)
    monkeypatch.setattr(routing, "sort_pairs", noted)
    monkeypatch.setattr(routing, "combine", combine)
    return found


def block(kind: str = "qwen3_moe", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "num_experts": EXPERTS,
             "num_local_experts": EXPERTS, "num_experts_per_tok": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options))
    return model.eval().model.layers[0].mlp


def served(made: Any) -> Any:
    experts_served.register()
    made.experts.config = copy.copy(made.experts.config)
    made.experts.config._experts_implementation = experts_served.IMPLEMENTATION
    return made


def output(made: Any, x: torch.Tensor) -> torch.Tensor:
    found = made(x)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
@torch.no_grad()
def test_tokens_have_the_outputs_of_transformers_forward(kind, tokens, taken):
    made, x = block(kind), torch.randn(1, tokens, 64)
    wanted = output(made, x)
    with unfused(made):
        torch.testing.assert_close(output(served(made), x), wanted, rtol=1e-4, atol=1e-5)
    assert taken == ([2 * tokens] if tokens < 200 else [])


@pytest.mark.parametrize("gate", ["silu", "swish", "gelu", "one that is hooked", "one of its own", "one in its place"])
@torch.no_grad()
def test_only_transformers_own_silu_takes_one_pass(gate, taken, monkeypatch):
    made, x, passed = block(hidden_act=gate if " " not in gate else "silu"), torch.randn(1, 7, 64), []
    experts = made.experts
    if gate == "one that is hooked":
        experts.act_fn.register_forward_hook(lambda module, args, y: 2 * y)
    elif gate == "one of its own":
        experts._apply_gate = lambda both: both.chunk(2, -1)[1] * 3
    elif gate == "one in its place":
        experts.act_fn.forward = torch.tanh
    monkeypatch.setattr(
        plain_rows, "silu_gated", lambda both, plain=plain_rows.silu_gated: passed.append(1) or plain(both)
    )
    with unfused(made):
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = "grouped_mm"
        wanted = output(made, x)
        torch.testing.assert_close(output(served(made), x), wanted, rtol=1e-4, atol=1e-5)
    assert taken == [14] and len(passed) == (gate in ("silu", "swish"))


@torch.no_grad()
def test_a_gate_whose_weights_are_brought_while_it_is_calibrated_takes_one_pass_too(taken, monkeypatch):
    made, passed = block(), []
    monkeypatch.setattr(
        plain_rows, "silu_gated", lambda both, plain=plain_rows.silu_gated: passed.append(1) or plain(both)
    )
    with unfused(made), Weights(made, torch.device("cpu"), stream=False, capacity=2**40, unit_bytes=2**40):
        assert made.experts.act_fn._forward_pre_hooks
        output(served(made), torch.randn(1, 7, 64))
    assert taken and passed


@torch.no_grad()
def test_while_the_second_product_waits_only_its_input_is_kept(taken):
    made, alive = block(), []
    with unfused(made):
        up, down = (made.experts.__dict__[name].call for name in ("gate_up_proj", "down_proj"))
        up.register_forward_hook(lambda module, args, y: alive.extend(map(weakref.ref, (args[0], y))))
        down.register_forward_pre_hook(lambda module, args: alive.append([one() is None for one in alive]))
        output(served(made), torch.randn(1, 7, 64))
    assert taken and alive[-1] == [True, True]


@torch.no_grad()
def test_a_compiled_model_calls_them_as_they_are(taken):
    made, x = block(), torch.randn(1, 7, 64)
    wanted = output(made, x)
    with unfused(made):
        compiled = torch.compile(served(made), backend="eager")
        torch.testing.assert_close(output(compiled, x), wanted, rtol=1e-4, atol=1e-5)
    assert taken == [14]


@pytest.mark.parametrize("why", ["gradients", "biases", "experts in one parameter"])
def test_everything_else_goes_through_transformers_forward(why, taken):
    made, x = block("gpt_oss" if why == "biases" else "qwen3_moe"), torch.randn(1, 7, 64)
    with torch.set_grad_enabled(why == "gradients"):
        wanted = output(made, x)
        if why == "experts in one parameter":
            found = output(served(made), x)
        else:
            with unfused(made):
                found = output(served(made), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert taken == []


def test_a_process_that_loads_a_whole_module_knows_the_implementation(tmp_path):
    made = block()
    with unfused(made):
        (tmp_path / "module").write_bytes(pickle.dumps(served(made)))
    program = (
        "import pickle, sys, torch\n"
        f"made = pickle.loads(open({str(tmp_path / 'module')!r}, 'rb').read())\n"
        "print(made(torch.randn(1, 3, 64)).shape)\n"
    )
    ran = subprocess.run([python(), "-c", program], capture_output=True, text=True, check=False)
    assert "[1, 3, 64]" in ran.stdout, ran.stderr
    assert experts_served.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS
