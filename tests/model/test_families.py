"""A fine-tune that ends in a quantized export, once for each family of models: their batches, their losses, and what
each keeps in other places than a Llama does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

from gptq_plugin import GPTQCallback, QuantizeModule, load_quantized

VOCABULARY, LENGTH, SAMPLES = 128, 24, 16
IMAGE = 100  # the token that stands for a part of an image
PARTS = 16  # such tokens of an image: 4 x 4 patches of 8 x 8 pixels, or of 16 x 16

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BART = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}

Sample = dict[str, Tensor]


def text(sample: int) -> Sample:
    """Tokens with some padding; what is padded is no label."""
    ids = torch.randint(3, IMAGE, (LENGTH,), generator=torch.Generator().manual_seed(sample))
    mask = torch.ones_like(ids)
    mask[LENGTH - sample % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def plain_text(sample: int) -> Sample:
    """For models with a state, whose padding does not leave the other positions alone."""
    return {**text(4 * sample), "attention_mask": torch.ones(LENGTH, dtype=torch.long)}


def pixels(sample: int) -> Tensor:
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(sample))


def translation(sample: int) -> Sample:
    return {**text(sample), "labels": text(sample + 1000)["labels"][:12]}


def speech(sample: int) -> Sample:
    sound = torch.randn(16, 40, generator=torch.Generator().manual_seed(sample))  # bins, steps
    return {"input_features": sound, "labels": text(sample)["labels"][:12]}


def sentence(sample: int) -> Sample:
    return {**text(sample), "labels": torch.tensor(sample % 2)}


def picture(sample: int) -> Sample:
    return {"pixel_values": pixels(sample), "labels": torch.tensor(sample % 2)}


def described(sample: int, image: Sample) -> Sample:
    """An image, whose tokens stand before the text."""
    ids, marks = text(sample)["input_ids"], torch.full((PARTS,), IMAGE)
    ids = torch.cat([torch.tensor([1, 102]), marks, ids])
    labels = ids.clone()
    labels[: PARTS + 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **image}


def llava(sample: int) -> Sample:
    return described(sample, {"pixel_values": pixels(sample)})


def gemma(sample: int) -> Sample:
    made = llava(sample)
    return {**made, "token_type_ids": (made["input_ids"] == IMAGE).long()}


def qwen(sample: int) -> Sample:
    """Patches of two frames of 8 x 8 pixels, of which four are a token."""
    patches = torch.randn(4 * PARTS, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(sample))
    made = described(sample, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 8, 8]])})
    return {**made, "mm_token_type_ids": (made["input_ids"] == IMAGE).long()}


def together(samples: list[Sample]) -> Sample:
    """As Qwen's processors do: the patches of all images in one row."""
    put = {"pixel_values": torch.cat, "image_grid_thw": torch.cat}
    return {name: put.get(name, torch.stack)([sample[name] for sample in samples]) for name in samples[0]}


@dataclass(frozen=True)
class Family:
    """A tiny model and its data.

    Attributes:
        kind: transformers' name of it.
        sample: Makes one.
        fields: Of its configuration.
        task: transformers' class.
        quantized: Ends of names of layers that must be quantized.
        left: Ends of names that must not.
        collate: Puts samples together.
    """

    kind: str
    sample: Callable[[int], Sample]
    fields: dict[str, Any]
    task: Any = AutoModelForCausalLM
    quantized: tuple[str, ...] = ("q_proj", "o_proj", "down_proj")
    left: tuple[str, ...] = ("lm_head",)
    collate: Callable[[list[Sample]], Sample] | None = None

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.task.from_config(AutoConfig.for_model(self.kind, **self.fields))

    def loader(self) -> DataLoader[Any]:
        return DataLoader([self.sample(n) for n in range(SAMPLES)], batch_size=4, collate_fn=self.collate)


FAMILIES = [
    Family("qwen3_moe", text, {**TEXT, **EXPERTS}, quantized=("q_proj", "experts.3.down_proj"), left=("mlp.gate",)),
    Family(
        "t5", translation,
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2,
         "decoder_start_token_id": 0},
        AutoModelForSeq2SeqLM, ("SelfAttention.q", "EncDecAttention.k", "DenseReluDense.wo"),
    ),
    Family("bart", translation, BART, AutoModelForSeq2SeqLM, ("encoder_attn.k_proj", "self_attn.q_proj", "fc2")),
    Family(
        "whisper", speech, {**BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        AutoModelForSpeechSeq2Seq, ("encoder_attn.k_proj", "self_attn.q_proj", "fc2"), ("proj_out",),
    ),
    Family("bert", sentence, TEXT, AutoModelForSequenceClassification, ("query", "output.dense"), ("classifier",)),
    Family("modernbert", text, TEXT, AutoModelForMaskedLM, ("Wqkv", "Wi", "Wo"), ("decoder",)),
    Family("vit", picture, VISION, AutoModelForImageClassification, ("q_proj", "fc2"), ("classifier",)),
    Family(
        "siglip", picture, {"vision_config": VISION, "text_config": TEXT}, AutoModelForImageClassification,
        ("q_proj", "out_proj", "fc2"), ("classifier",),
    ),
    Family(
        "llava", llava,
        {"vision_config": {"model_type": "clip_vision_model", **VISION}, "image_token_index": IMAGE,
         "text_config": {"model_type": "llama", **TEXT}, "vision_feature_layer": -1},
        AutoModelForImageTextToText,
    ),
    Family(
        "gemma3", gemma,
        {"vision_config": VISION, "text_config": TEXT, "image_token_index": IMAGE, "mm_tokens_per_image": PARTS},
        AutoModelForImageTextToText,
    ),
    Family(
        "qwen2_5_vl", qwen,
        {"text_config": {**TEXT, "rope_parameters": QWEN_ROPE}, **QWEN_TOKENS, "vision_config": {
            "hidden_size": 64, "intermediate_size": 96, "depth": 2, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 32}},
        AutoModelForImageTextToText, collate=together,
    ),
    Family(
        "qwen3_vl", qwen,
        {"text_config": {**TEXT, "rope_parameters": QWEN_ROPE}, **QWEN_TOKENS, "vision_config": {
            "hidden_size": 64, "intermediate_size": 96, "depth": 2, "num_heads": 2, "patch_size": 8,
            "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}},
        AutoModelForImageTextToText, collate=together,
    ),
    Family(
        "mamba2", plain_text,
        {**TEXT, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8, "conv_kernel": 4},
        quantized=("mixer.out_proj",),
    ),
    Family(
        "jamba", plain_text,
        {**TEXT, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 32, "use_mamba_kernels": False},
        quantized=("mamba.in_proj", "mamba.out_proj", "self_attn.q_proj", "experts.3.down_proj"), left=("router",),
    ),
    Family(
        "qwen3_next", plain_text,
        {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 2,
         "linear_num_key_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
         "layer_types": ["linear_attention", "full_attention"]},
        quantized=("linear_attn.in_proj_qkvz", "self_attn.q_proj", "experts.3.down_proj", "shared_expert.up_proj"),
        left=("mlp.gate", "shared_expert_gate"),
    ),
    Family(
        "gpt2", text,
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
         "eos_token_id": 2}, quantized=("attn.c_attn", "mlp.c_proj"),
    ),
]  # fmt: skip


class Tuned(pl.LightningModule):
    """The usual fine-tune."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Sample, _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def tune(model: Any, loader: DataLoader[Any], out: Path, **config: Any) -> GPTQCallback:
    """Three steps of training, then 4 bits unless `config` says otherwise."""
    quantizer = QuantizeModule(**{"bits": 4, "group_size": 32, "nsamples": SAMPLES, "clip_ratios": (1.0,), **config})
    callback = GPTQCallback(quantizer, export_dir=out)
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[callback],
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=out.parent,
    )  # fmt: skip
    trainer.fit(Tuned(model), loader)
    return callback


@torch.no_grad()
def logits(model: Any, loader: DataLoader[Any]) -> Tensor:
    batch = next(iter(loader))
    result: Tensor = model.eval()(**batch).logits
    return result


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_a_fine_tune_ends_in_an_export_that_computes_what_the_quantized_model_does(
    family: Family, tmp_path: Path
) -> None:
    model = family.model()
    report = tune(model, family.loader(), tmp_path / "out").report
    assert report is not None
    names = [module.name for module in report.quantized]
    assert all(module.method == "gptq" and module.tokens > 0 for module in report.quantized)
    for end in family.quantized:
        assert any(name.endswith(end) for name in names), (end, names)
    assert not [name for name in names if name.endswith(family.left)]
    loaded, expected = load_quantized(tmp_path / "out"), logits(model, family.loader())
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, family.loader()), expected) and expected.std() > 0.01


def test_so_does_that_of_adapters_which_stay_as_they_are(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    llama = Family("llama", text, TEXT)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama.model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    tune(adapted, llama.loader(), tmp_path / "out", bits=8)
    expected, loaded = logits(adapted, llama.loader()), load_quantized(tmp_path / "out")
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert 0 < (logits(loaded, llama.loader()) - expected).abs().max() < 0.02 * expected.abs().max()


CODE = {
    "configuration_own.py": """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=128, hidden_size=64, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)
""",
    "modeling_own.py": """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig

class OwnExperts(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, width, 96) / 8)
        self.down = nn.Parameter(torch.randn(3, 96, width) / 10)

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for number in range(3):
            mine = chosen == number
            y[mine] = torch.relu(x[mine] @ self.up[number]) @ self.down[number]
        return y

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.experts = OwnExperts(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, labels=None, attention_mask=None):
        x = self.mix(self.embed(input_ids))
        logits = self.head(x + self.experts(x, input_ids % 3))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
""",
}


@pytest.fixture
def own_code(tmp_path: Path, modules_cache: Callable[[Path], AbstractContextManager[None]]) -> Iterator[Any]:
    """A model whose class lies in the folder it was loaded from."""
    source = tmp_path / "own-model"
    source.mkdir()
    for name, code in CODE.items():
        (source / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (source / "config.json").write_text(json.dumps(config))
    with modules_cache(tmp_path / "modules"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        torch.manual_seed(0)
        yield AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def test_so_does_that_of_a_model_with_code_of_its_own(own_code: Any, tmp_path: Path) -> None:
    """And with experts that are like no others."""
    loader = Family("own", text, {}).loader()
    report = tune(own_code, loader, tmp_path / "out").report
    assert report is not None
    names = {module.name for module in report.quantized}
    assert names == {"mix", *(f"experts.{number}.{part}" for number in range(3) for part in ("up", "down"))}
    loaded = load_quantized(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == type(own_code).__name__ and type(loaded) is not type(own_code)
    assert torch.equal(logits(loaded, loader), logits(own_code, loader))
