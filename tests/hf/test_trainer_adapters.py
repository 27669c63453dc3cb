"""GPTQTrainerCallback on models with PEFT adapters: a merged copy is quantized and exported, the model stays."""

from __future__ import annotations

import functools
from types import MethodType

import peft
import pytest
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from torch import nn

from gptq_plugin import GPTQTrainerCallback, QuantizeModule, QuantLinear, load_quantized
from gptq_plugin.errors import ExportError, TargetError

from trainer_runs import SMALL, Rows, Tokenizer, Trainer, Untrained, llama, quantized, same, train

IDS = torch.arange(12)[None]


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})


def adapted(**options):
    return peft.get_peft_model(llama(), lora(**options))


def inside():
    """transformers' own integration: PEFT's layers without its wrapper."""
    model = llama()
    model.add_adapter(lora())
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check_is_merged(folder, model):
    """That 8 bits in the folder are the adapted model, and not its base."""
    wanted, base = logits(model), logits(llama())
    assert (logits(load_quantized(folder)) - wanted).abs().mean() < 0.05 * (base - wanted).abs().mean()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (adapted, {}),
        (lambda: adapted(use_dora=True), {"gradient_checkpointing": True}),
        (inside, {"bf16": True}),  # accelerate then replaces the model's forward
    ],
    ids=["LoRA", "DoRA", "add_adapter"],
)
def test_the_merged_model_is_exported_and_the_trainer_saves_the_adapters_as_without_us(make, options, tmp_path):
    model, twin = make(), make()
    alone = train(twin, [], tmp_path, **options)
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL, bits=8), tmp_path / "out")
    trainer = train(model, [callback], tmp_path, **options)
    assert quantized(model) == [] and len(callback.report.quantized) == 7 and callback.report.deviations == []
    assert same(model, twin)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]
    check_is_merged(tmp_path / "out", model)
    assert trainer.evaluate(Rows())["eval_loss"] == alone.evaluate(Rows())["eval_loss"]
    for name, one in (("saved", trainer), ("alone", alone)):
        one.save_model(str(tmp_path / name))
    files, wanted_files = ({path.name for path in (tmp_path / name).iterdir()} for name in ("saved", "alone"))
    assert "adapter_model.safetensors" in files and files == wanted_files
    saved, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "alone"))
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in wanted)


class SFT(Trainer):
    """As TRL's: prepares texts and collates them itself, has a loss and a forward of its own, wraps the model."""

    def __init__(self, model, args, peft_config=None, train_dataset=None, processing_class=None, **options):
        rows = [processing_class(text)["input_ids"] for text in train_dataset]
        plain = model.forward

        @functools.wraps(type(model).forward)
        def forward(self, *args, counted=False, **kwargs):
            return plain(*args, **kwargs)

        model.forward = MethodType(forward, model)
        super().__init__(
            peft.get_peft_model(model, peft_config), args, train_dataset=rows, data_collator=self.collate,
            processing_class=processing_class, **options,
        )  # fmt: skip

    @staticmethod
    def collate(rows):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100).masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        out = model(**inputs, counted=True)
        return (out.loss, out) if return_outputs else out.loss


def test_a_trainer_like_trls_is_quantized_with_the_positions_that_its_loss_counts(tmp_path):
    texts = ["question: " + "answer" * (number % 3 + 1) for number in range(24)]  # 16, 22 and 28 tokens
    quantizer = QuantizeModule(**SMALL | {"nsamples": 24}, token_weighting="labels")
    callback = GPTQTrainerCallback(quantizer, tmp_path / "out")
    options = {"peft_config": lora(), "processing_class": Tokenizer()}
    trainer = train(llama(), [callback], tmp_path, texts, SFT, options, remove_unused_columns=False)
    assert isinstance(trainer.model, peft.PeftModel) and quantized(trainer.model) == []
    assert callback.report.tokens == 8 * (11 + 17 + 23) and callback.report.samples == 24
    assert len(quantized(load_quantized(tmp_path / "out"))) == 7
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_of_several_adapters_the_active_one_is_merged(tmp_path):
    model = adapted()
    model.add_adapter("second", lora())
    model.set_adapter("second")
    train(model, [GPTQTrainerCallback(QuantizeModule(**SMALL, bits=8), tmp_path / "out")], tmp_path)
    check_is_merged(tmp_path / "out", model)
    exported, second = logits(load_quantized(tmp_path / "out")), logits(model)
    model.set_adapter("default")
    assert (exported - second).abs().mean() < 0.05 * (logits(model) - second).abs().mean()


def test_the_adapters_of_the_best_checkpoint_are_merged_and_the_report_names_it(tmp_path):
    model = adapted()
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL, bits=8), tmp_path / "out")
    trainer = train(
        model, [callback], tmp_path, max_steps=3, greater_is_better=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=0.1,
        trainer_options={"eval_dataset": Rows()},
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    assert callback.report.float_checkpoint == best
    check_is_merged(tmp_path / "out", peft.PeftModel.from_pretrained(llama(), best))


def test_a_forward_given_runs_the_merged_copy(tmp_path):
    seen = []

    def forward(model, batch):
        seen.append(any("lora" in name for name, _ in model.named_modules()))
        return model(input_ids=batch["input_ids"])

    train(adapted(), [GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", forward=forward)], tmp_path)
    assert len(seen) > 1 and not any(seen)


def test_a_tie_that_the_adapters_broke_is_in_the_report(tmp_path):
    tied = llama().config
    tied.tie_word_embeddings = True
    model = peft.get_peft_model(type(llama())(tied), lora(target_modules=["lm_head", "q_proj"]))
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out")
    train(model, [callback], tmp_path)
    assert any("with tie_word_embeddings=false" in deviation for deviation in callback.report.deviations)


def test_when_quantization_fails_the_adapters_are_saved_where_no_checkpoint_holds_them(tmp_path):
    class Full(Tokenizer):
        def save_pretrained(self, directory):
            raise OSError("disk full")

    model = adapted()
    with pytest.raises(ExportError, match="disk full"):
        train(model, [GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", tokenizer=Full())], tmp_path)
    reloaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "run" / "trained-3")
    assert same(reloaded, model)


def on_packed_weights():
    model = adapted()

    class Linear4bit(nn.Linear):  # a stand-in for bitsandbytes', which needs a GPU: packed uint8, no gradient
        pass

    packed = Linear4bit(64, 64, bias=False)
    packed.weight = nn.Parameter(torch.zeros(64 * 32, 1, dtype=torch.uint8), requires_grad=False)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer = packed
    return model


def on_our_layers():
    model = llama()
    QuantizeModule(**SMALL).round_to_nearest(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    config._register_custom_module({QuantLinear: GPTQLoraLinear})
    return peft.get_peft_model(model, config)


def disabled():
    model = adapted()
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (adapted, {"export_dir": "out", "swap": True}, "leave swap out"),
        (adapted, {}, "give an export_dir"),
        (on_packed_weights, {"export_dir": "out"}, "q_proj sit on a Linear4bit.*Load the base model in bfloat16"),
        (on_our_layers, {"export_dir": "out"}, "quantized already: train its adapters without the callback"),
        (disabled, {"export_dir": "out"}, "are disabled.*Enable them"),
    ],
)
def test_what_cannot_be_done_with_adapters_is_refused_before_training(make, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetError, match=message):
        train(make(), [GPTQTrainerCallback(QuantizeModule(**SMALL), **options)], tmp_path, kind=Untrained)
    assert not (tmp_path / "out").exists()
