"""GPTQCallback on a module with PEFT adapters: a merged copy is quantized and exported, the module stays as it is."""

from __future__ import annotations

import peft
import pytest
import torch

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized
from gptq_plugin.errors import TargetError

from lightning_runs import SMALL, Holds, Is, fit, llama, quantized, token_loader


class Adapted(Holds):
    """A LoRA fine-tune: the wrapped model in an attribute, only the adapters trained."""

    def __init__(self, **options):
        super().__init__()
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
        self.model = peft.get_peft_model(llama(), config)

    def val_dataloader(self):
        return token_loader()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)


class Inside(Adapted):
    """transformers' own integration: PEFT's layers without its wrapper."""

    def __init__(self):
        Holds.__init__(self)
        self.model = llama()
        self.model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("make", [Adapted, lambda: Adapted(use_dora=True), Inside], ids=["LoRA", "DoRA", "add_adapter"])
def test_the_merged_model_is_exported_and_the_adapters_and_their_base_stay(make, tmp_path):
    module, twin = make(), make()
    fit(twin, token_loader(), [], tmp_path)
    callback = GPTQCallback(QuantizeModule(**SMALL, bits=8), tmp_path / "out")
    fit(module, token_loader(), [callback], tmp_path)
    assert quantized(module) == [] and len(callback.report.quantized) == 7
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(p.requires_grad for n, p in module.named_parameters() if "lora_" in n)
    exported, ids = load_quantized(tmp_path / "out"), torch.arange(12)[None]
    with torch.no_grad():
        wanted, base = module.model.eval()(input_ids=ids).logits, llama().eval()(input_ids=ids).logits
        found = exported(input_ids=ids).logits
    assert (found - wanted).abs().mean() < 0.05 * (base - wanted).abs().mean()  # 8 bits of the adapted model
    metric = callback.report.metrics["val_loss"]
    assert metric["gptq"] == pytest.approx(metric["float"], rel=0.01) and metric["gptq"] != metric["float"]


def test_several_callbacks_each_export_the_merged_model(tmp_path):
    callbacks = [GPTQCallback(QuantizeModule(**SMALL, bits=bits), tmp_path / str(bits)) for bits in (4, 3)]
    fit(Adapted(), token_loader(), callbacks, tmp_path)
    assert [len(quantized(load_quantized(tmp_path / str(bits)))) for bits in (4, 3)] == [7, 7]


def test_a_tie_that_the_adapters_broke_is_in_the_report(tmp_path):
    class TiedHead(Holds):
        def __init__(self):
            super().__init__()
            config = self.model.config
            config.tie_word_embeddings = True
            tied = type(self.model)(config)
            options = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
            self.model = peft.get_peft_model(tied, peft.LoraConfig(r=4, **options))

    callback = GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out")
    fit(TiedHead(), token_loader(), [callback], tmp_path)
    assert any("with tie_word_embeddings=false" in deviation for deviation in callback.report.deviations)
    exported = load_quantized(tmp_path / "out")
    assert not torch.equal(exported.lm_head.weight, exported.model.embed_tokens.weight)


class NeverTrained:
    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


class Untrained(NeverTrained, Adapted):
    pass


class AdaptedItself(NeverTrained, Is):
    def __init__(self):
        super().__init__()
        self.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Untrained, {"export_dir": "out", "swap": True}, "leave swap out"),
        (Untrained, {}, "give an export_dir"),
        (AdaptedItself, {"export_dir": "out"}, "hold the model in an attribute"),
    ],
)
def test_what_cannot_be_done_with_adapters_is_refused_before_training(module, options, message, tmp_path):
    if "export_dir" in options:
        options = {**options, "export_dir": tmp_path / "out"}
    with pytest.raises(TargetError, match=message):
        fit(module(), token_loader(), [GPTQCallback(QuantizeModule(**SMALL), **options)], tmp_path)
