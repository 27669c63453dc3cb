"""Which layers give a classifier's output; they stay float unless lm_head asks for them."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.model.structure import Structure

from lightning_runs import Plain
from models import tiny_gpt2, tiny_llama

LABELS = 24  # divides into words at 4 bits
BERT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 64}  # fmt: skip
DISTILBERT = {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64}
GPT2 = {
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RESNET = {"embedding_size": 32, "hidden_sizes": [32], "depths": [1]}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64}  # fmt: skip
SPEECH = BERT | {"conv_dim": [32], "conv_stride": [2], "conv_kernel": [3], "num_feat_extract_layers": 1,
                 "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
IMAGE = {"image_size": 32, "patch_size": 16}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def built(kind, model_type, sizes):
    torch.manual_seed(0)
    return getattr(transformers, kind)(AutoConfig.for_model(model_type, num_labels=LABELS, **sizes)).eval()


def heads(model):
    structure = Structure.of(model)
    return [name for name, layer in structure.linears.items() if layer in structure.output_heads]


@pytest.mark.parametrize(
    ("kind", "model_type", "sizes", "found"),
    [
        ("BertForSequenceClassification", "bert", BERT, ["classifier"]),
        ("BertForTokenClassification", "bert", BERT, ["classifier"]),
        ("RobertaForSequenceClassification", "roberta", BERT, ["classifier.out_proj"]),
        ("DistilBertForSequenceClassification", "distilbert", DISTILBERT, ["classifier"]),
        ("DebertaV2ForSequenceClassification", "deberta-v2", BERT, ["classifier"]),
        ("LlamaForSequenceClassification", "llama", BERT, ["score"]),
        ("GPT2ForTokenClassification", "gpt2", GPT2, ["classifier"]),
        ("BartForSequenceClassification", "bart", SEQ2SEQ, ["classification_head.out_proj"]),
        ("ViTForImageClassification", "vit", BERT | IMAGE, ["classifier"]),
        ("ResNetForImageClassification", "resnet", RESNET, ["classifier.1"]),
        ("Wav2Vec2ForSequenceClassification", "wav2vec2", SPEECH, ["classifier"]),
        ("Wav2Vec2ForCTC", "wav2vec2", SPEECH, ["lm_head"]),
        ("WhisperForAudioClassification", "whisper", SEQ2SEQ, ["classifier"]),
        ("CLIPForImageClassification", "clip", {"vision_config": TOWER | IMAGE, "text_config": TOWER}, ["classifier"]),
        ("DeiTForImageClassificationWithTeacher", "deit", BERT | IMAGE, ["cls_classifier", "distillation_classifier"]),
        ("BertForMaskedLM", "bert", BERT, []),  # its output embedding is known, and its transform is none
        ("DistilBertForMaskedLM", "distilbert", DISTILBERT, []),
        ("BertModel", "bert", BERT, []),
        ("T5ForConditionalGeneration", "t5", T5, []),
    ],
    ids=lambda value: value if isinstance(value, str) and "For" in value else "",
)  # fmt: skip
def test_a_classifiers_output_layers_are_found(kind, model_type, sizes, found):
    assert heads(built(kind, model_type, sizes)) == found


class Own(nn.Module):
    """A head of one's own behind a model without one, and a layer before it."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.bert = BertModel(BertConfig(**BERT))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, LABELS))

    def forward(self, input_ids):
        return self.head(self.bert(input_ids).last_hidden_state[:, 0])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"reader": BertModel(BertConfig(**BERT)), "topic": nn.Linear(32, 32)})
        self.length = nn.Linear(32, 8)


def test_what_users_put_behind_a_model_without_a_head_is_one():
    assert heads(Own()) == ["head.2"] and heads(Nested()) == ["net.topic", "length"]


def test_without_a_transformers_model_every_layer_is_like_the_others():
    assert heads(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, LABELS))) == heads(Plain()) == []


def test_a_model_that_writes_has_no_other_head_than_its_output_embedding():
    class Holds(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.value = nn.Linear(64, 32)

    assert [heads(model) for model in (tiny_llama(), tiny_gpt2(), Holds(tiny_llama()))] == [[], [], []]


@pytest.mark.parametrize("lm_head", [False, True])
def test_a_head_stays_float_unless_lm_head_is_set_and_the_export_loads(lm_head, tmp_path):
    model = built("BertForSequenceClassification", "bert", BERT)
    quantizer = QuantizeModule(QuantizeConfig(group_size=32, nsamples=8, lm_head=lm_head))
    data = [torch.randint(0, 64, (16,)).tolist() for _ in range(40)]
    report = quantizer.quantize(model, data, nsamples=40)
    by_name = {layer.name: layer for layer in report.modules}
    if lm_head:
        assert by_name["classifier"].method == "gptq"
    else:
        assert by_name["classifier"].reason == "output head of a classifier (lm_head=false)"
        assert not by_name["classifier"].deviations  # as asked
    assert by_name["bert.pooler.dense"].method == "gptq"
    quantizer.export(model, tmp_path / "out")
    ids = torch.tensor([data[0]])
    with torch.no_grad():
        torch.testing.assert_close(load_quantized(tmp_path / "out")(ids).logits, model(ids).logits)


def test_a_plain_modules_last_layer_is_quantized_as_the_others():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, LABELS))
    report = QuantizeModule(group_size=32, nsamples=64).quantize(model, torch.randn(64, 32))
    assert [layer.method for layer in report.modules] == ["gptq", "gptq"]
