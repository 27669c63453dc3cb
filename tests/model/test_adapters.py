"""Merging PEFT adapters into a copy: what the copy computes, what the original keeps, and what is refused."""

from __future__ import annotations

import copy
import warnings
from types import MethodType

import lightning.pytorch as pl
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.errors import TargetError
from gptq_plugin.model.adapters import has_adapters, merged_copy

IDS = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(3))
ATTENTION = ["q_proj", "v_proj"]


def llama(**options):
    torch.manual_seed(0)
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "vocab_size": 96}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**values, **options}))


def mixtral():
    config = AutoConfig.for_model("mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=96,
                                  num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def lora(**options):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "target_modules": ATTENTION, **options})


def adapted(config, model=None, name="default", trained=True):
    model = get_peft_model(model or llama(), config, adapter_name=name)
    if trained:
        disturb(model)
    return model.eval()


def disturb(model):
    """Moves everything that trains, as training would: a fresh LoRA changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(name, p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()]
    layers = [
        (name, layer.training, list(getattr(layer, "merged_adapters", [])), layer.__dict__.get("_active_adapter"))
        for name, layer in model.named_modules()
    ]
    hooks = [list(layer._forward_hooks.values()) for layer in model.modules()]
    return state, flags, layers, hooks, model.config.to_dict()


def assert_unchanged(model, before):
    state, *rest = before
    assert [*snapshot(model)[1:]] == rest  # flags, places in memory, counts of writes, active and merged adapters
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


KINDS = {
    "lora": lambda: adapted(lora()),
    "dora": lambda: adapted(lora(use_dora=True)),
    "rslora with its own biases": lambda: adapted(
        lora(use_rslora=True, lora_bias=True), model=llama(attention_bias=True)
    ),
    "every linear layer": lambda: adapted(lora(target_modules="all-linear", use_dora=True)),
    "a trained head": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "trained embeddings": lambda: adapted(lora(modules_to_save=["embed_tokens"])),
    "an adapted head": lambda: adapted(lora(target_modules=["lm_head", "q_proj"])),
    "an adapted embedding": lambda: adapted(lora(target_modules=["embed_tokens", "q_proj"])),
    "an adapted embedding, DoRA": lambda: adapted(lora(target_modules=["embed_tokens"], use_dora=True)),
    "trained tokens": lambda: adapted(lora(trainable_token_indices=[1, 5])),
    "IA3": lambda: adapted(IA3Config(target_modules=[*ATTENTION, "down_proj"], feedforward_modules=["down_proj"])),
    "VeRA": lambda: adapted(VeraConfig(r=3, target_modules=["q_proj", "o_proj"])),
    "LN tuning": lambda: adapted(LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "fused experts": lambda: adapted(
        lora(lora_dropout=0.0, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), model=mixtral()
    ),
    "Conv1D": lambda: adapted(
        lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        model=AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_computes_what_the_adapted_model_does_and_the_original_stays(kind):
    model = KINDS[kind]()
    expected = logits(model)
    before = snapshot(model)  # now: PEFT itself registers experts anew in every forward
    merged = merged_copy(model)
    assert_unchanged(model, before)
    assert has_adapters(model) and not has_adapters(merged)
    assert type(merged) is type(model.get_base_model())
    assert {*merged.state_dict()} == {*AutoModelForCausalLM.from_config(merged.config).state_dict()}
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    assert (expected - logits(base_of(model))).abs().max() > 1e-3


def base_of(model):
    base = copy.deepcopy(model).unload()
    return base.eval()


def test_only_what_an_adapter_changes_takes_memory():
    model = adapted(lora())
    merged = merged_copy(model)
    old = {p.data_ptr() for p in model.parameters()}
    new = {name for name, p in merged.named_parameters() if p.data_ptr() not in old}
    assert new == {f"model.layers.{i}.self_attn.{name}.weight" for i in (0, 1) for name in ATTENTION}
    assert not any(p.requires_grad for p in merged.parameters())


def test_moving_or_casting_the_copy_does_not_move_the_original():
    model = adapted(lora())
    before = snapshot(model)
    merged_copy(model).to(torch.float64).train()
    assert_unchanged(model, before)


def test_a_model_with_adapters_of_its_own_is_merged_too():
    model = llama()
    model.add_adapter(lora(use_dora=True, init_lora_weights=False))
    model.eval()
    before, expected = snapshot(model), logits(model)
    merged = merged_copy(model)
    assert not has_adapters(merged) and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected)
    assert_unchanged(model, before)


def test_a_compiled_lightning_module_that_is_the_model_is_merged():
    class Is(LlamaForCausalLM, pl.LightningModule):
        def __init__(self):
            super().__init__(llama().config)

    model = Is()
    model.add_adapter(lora(init_lora_weights=False))
    model.compile()
    compiled = model._compiled_call_impl
    merged = merged_copy(model)
    assert type(merged) is Is and not has_adapters(merged)
    assert merged._compiled_call_impl is None and model._compiled_call_impl is compiled


def test_a_module_that_holds_an_adapted_model_is_merged_inside():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"backbone": adapted(lora()), "head": nn.Linear(96, 4)})

    holder = Holder().eval()
    merged = merged_copy(holder)
    assert type(merged.net["backbone"]) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged.net["backbone"]), logits(holder.net["backbone"]))
    assert merged.net["head"].weight.data_ptr() == holder.net["head"].weight.data_ptr()


def test_of_several_adapters_the_active_ones_are_merged():
    model = adapted(lora(), name="first")
    model.add_adapter("second", lora(r=2, target_modules=["q_proj", "k_proj"]))
    for active in ("second", "first", ["first", "second"]):
        model.base_model.set_adapter(active)
        disturb(model.eval())
        before, expected = snapshot(model), logits(model)
        torch.testing.assert_close(logits(merged_copy(model)), expected, atol=2e-5, rtol=1e-5)
        assert_unchanged(model, before)


def test_what_is_merged_already_is_not_merged_twice_and_not_copied():
    model = adapted(lora())
    expected = logits(model)
    model.merge_adapter()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), expected)
    assert {p.data_ptr() for p in merged.parameters()} <= {p.data_ptr() for p in model.parameters()}
    assert_unchanged(model, before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_weights_of_low_precision_are_rounded_once(use_dora):
    model = adapted(lora(use_dora=use_dora)).to(torch.bfloat16)
    exact = copy.deepcopy(model).double().merge_and_unload()
    merged = merged_copy(model)
    for name, weight in merged.state_dict().items():
        if "q_proj" in name or "v_proj" in name:
            same = weight == exact.state_dict()[name].to(torch.bfloat16)
            assert weight.dtype == torch.bfloat16 and same.float().mean() > 0.999, name  # but for a tie or two
    twice = copy.deepcopy(model).merge_and_unload().state_dict()
    assert any(not torch.equal(twice[name], weight) for name, weight in merged.state_dict().items())


def test_a_head_trained_in_float32_takes_the_dtype_of_the_one_it_replaces():
    model = adapted(lora(modules_to_save=["lm_head"]), model=llama().to(torch.bfloat16))
    model.base_model.model.lm_head.modules_to_save.float()
    merged = merged_copy(model)
    assert merged.lm_head.weight.dtype == torch.bfloat16
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.dtype == torch.float32
    assert logits(merged).isfinite().all()


@pytest.mark.parametrize(
    "changed", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}]
)
def test_tied_embeddings_are_untied_in_the_copy_when_only_one_of_them_changed(changed, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on adapters of tied weights
        model = adapted(lora(**changed), model=llama(tie_word_embeddings=True))
    before, expected = snapshot(model), logits(model)
    merged = merged_copy(model)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    assert "tie_word_embeddings=false" in caplog.text
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-5)
    assert_unchanged(model, before)


TIED = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [2, 7]}, TIED])
def test_embeddings_that_stay_equal_stay_tied(options, caplog):
    model = adapted(lora(**options), model=llama(tie_word_embeddings=True))
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is True and not caplog.records


class Called:
    """An object in the place of a method, as accelerate's for mixed precision."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("kind", ["bound", "closure", "object", "both"])
def test_a_forward_that_was_replaced_runs_in_the_copy_and_on_the_copy(kind):
    model = adapted(lora())
    inner, calls = model.get_base_model(), []
    plain = inner.forward

    def bound(self, *args, scale=1.0, **kwargs):
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    def closure(*args, **kwargs):  # holds the original, as TRL's
        calls.append(plain.__self__)
        return plain(*args, **kwargs)

    kinds = {"bound": MethodType(bound, inner), "closure": closure, "object": Called(plain), "both": Called(closure)}
    inner.forward = new = kinds[kind]
    merged, ran = merged_copy(model), []
    for name, part in (("original", inner), ("copy", merged)):
        part.model.layers[1].mlp.register_forward_hook(lambda *_, name=name: ran.append(name))
    torch.testing.assert_close(logits(merged), logits(model))
    assert ran == ["copy", "original"]
    assert [call is merged for call in calls] == ([] if kind == "object" else [True, False])
    assert inner.forward is new


def test_a_users_hooks_run_in_the_copy_and_are_never_copied():
    class Watcher:
        def __init__(self):
            self.seen = 0

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def see(self, module, arguments, output):
            self.seen += 1

    watcher = Watcher()
    model = adapted(lora())
    model.base_model.model.model.norm.register_forward_hook(watcher.see)
    logits(merged_copy(model))
    assert watcher.seen == 1


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_is_quantized_exported_and_loaded(tied, tmp_path):
    base = llama(tie_word_embeddings=tied)
    base.generation_config.max_new_tokens = 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(lora(target_modules=["lm_head", *ATTENTION]), model=base)
    before = snapshot(model)
    merged = merged_copy(model)
    quantizer = QuantizeModule(bits=8, group_size=32, nsamples=8, batch_size=4)
    quantizer.quantize(merged, [{"input_ids": IDS}] * 3)
    quantizer.export(merged, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 7
    torch.testing.assert_close(logits(loaded), logits(merged.eval()))
    difference = (logits(loaded) - logits(model)).abs().max()
    assert difference < 0.1 * (logits(base_of(model)) - logits(model)).abs().max()
    assert_unchanged(model, before)


def test_quantizing_in_place_is_refused_with_the_remedy():
    model = adapted(lora())
    for part in (model, model.get_base_model()):
        with pytest.raises(TargetError, match=r"PEFT adapters.*gptq_plugin\.merged_copy\(model\)"):
            QuantizeModule(group_size=32).quantize(part, [{"input_ids": IDS}])


def test_disabled_adapters_are_refused():
    model = adapted(lora())
    with model.disable_adapter(), pytest.raises(TargetError, match=r"q_proj.* are disabled.*enable_adapter_layers"):
        merged_copy(model)
    model.base_model.set_adapter([])
    with pytest.raises(TargetError, match=r"no adapter of .*q_proj.* is active: .*set_adapter"):
        merged_copy(model)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING"),
    ],
)
def test_a_learned_prompt_is_refused(config, kind):
    model = adapted(config)
    assert has_adapters(model)
    with pytest.raises(TargetError, match=rf"adapter of type {kind}, which does not change weights.*get_base_model"):
        merged_copy(model)


def test_adapters_mixed_anew_for_every_token_are_refused(tmp_path):
    adapted(lora()).save_pretrained(tmp_path)
    base = llama()
    base.config.use_cache = False
    mix = XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters={"0": str(tmp_path)})
    with pytest.raises(TargetError, match="adapter of type XLORA, which does not change weights"):
        merged_copy(get_peft_model(base, mix))


def test_adapters_on_quantized_weights_are_refused_with_the_remedy():
    model = adapted(lora())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, BaseTunerLayer)

    class Linear4bit(nn.Linear):  # a stand-in for bitsandbytes', which needs a GPU: packed uint8, no gradient
        pass

    packed = Linear4bit(64, 64, bias=False)
    packed.weight = nn.Parameter(torch.zeros(64 * 32, 1, dtype=torch.uint8), requires_grad=False)
    layer.base_layer = packed
    with pytest.raises(TargetError, match=r"layers\.1\.self_attn\.q_proj sit on a Linear4bit, with .*uint8.*bfloat16"):
        merged_copy(model)
    layer.base_layer = nn.Module()  # buffers only, as GPTQ's and AWQ's layers
    layer.base_layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(TargetError, match="quantized already"):
        merged_copy(model)


def test_broken_adapters_and_those_peft_cannot_merge_are_named():
    model = adapted(lora())
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.v_proj cannot be merged.*NaN"):
        merged_copy(model)
    with pytest.raises(TargetError, match=r"q_proj cannot be merged.*no bias"):
        merged_copy(adapted(lora(lora_bias=True)))


def test_a_plain_model_has_no_adapters():
    assert not has_adapters(llama())
