"""What each client takes, and what is refused before a quantization for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.inventory import Inventory, LayerEntry
from gptq_plugin.clients.rules import CLIENTS, Client, conditions, problems
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.training.escalation import steps

SHAPES = {  # [in, out]
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (256, 128),
    "self_attn.v_proj": (256, 128),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (256, 1024),
    "mlp.up_proj": (256, 1024),
    "mlp.down_proj": (1024, 256),
}


def inventory(
    *, change: dict[str, dict[str, Any]] | None = None, leave: tuple[str, ...] = (), **fields: Any
) -> Inventory:
    """A Llama's block at 4 bits, symmetric, groups of 128, in float16; `change` by layer ("" for all of them)."""
    of_layer = {name: fields.pop(name) for name in ("bits", "group_size", "sym", "act_order") if name in fields}
    layers = []
    for name, (inputs, outputs) in SHAPES.items():
        if name in leave:
            continue
        layer = LayerEntry(f"model.layers.0.{name}", 4, 128, inputs, outputs, True, False)
        layers.append(dataclasses.replace(layer, **of_layer, **(change or {}).get(name, {})))
    plain = Inventory(
        checkpoint_format="gptq",
        layers=tuple(layers),
        floats=tuple(f"model.layers.0.{name}" for name in leave),
        lm_head=False,
        desc_act=bool(of_layer.get("act_order")),
        rules={},
        dtype=torch.float16,
        model_type="llama",
    )
    return dataclasses.replace(plain, **fields)


Q4 = {"self_attn.q_proj": {"bits": 8}}
QKV8 = {f"self_attn.{x}_proj": {"bits": 8} for x in "qkv"}
DOWN8 = {"mlp.down_proj": {"bits": 8}}
CT = "compressed-tensors"
RANGES = {"model.layers.0.self_attn.q_proj": 65504.0, "model.layers.0.self_attn.v_proj": 66000.0}

EXPERTS = tuple(f"model.layers.0.mlp.experts.{e}.{x}_proj" for e in (0, 1) for x in ("gate", "up", "down"))
MIXTRAL = tuple(f"model.layers.0.mlp.experts.{e}.w{x}" for e in (0, 1) for x in (1, 2, 3))
FUSED = ("model.layers.0.mlp.experts.0.gate_up_proj", "model.layers.0.mlp.experts.0.down_proj")


def experts(
    names: tuple[str, ...] = EXPERTS, *, leave: tuple[str, ...] = (), change: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """A block of experts beside attention; `change` is of its last layer, `own` of all."""
    layers = [LayerEntry(name, **{**GRID, **own}) for name in (*names, "model.layers.0.self_attn.o_proj")]
    layers[-2] = dataclasses.replace(layers[-2], **(change or {}))
    return {"layers": tuple(x for x in layers if x.name not in leave), "floats": leave}


GRID = {"bits": 4, "group_size": 128, "in_features": 256, "out_features": 256, "sym": True, "act_order": False}

REFUSED = [
    # client, ranks, the checkpoint, words of the sentence (which layer, why, what works instead)
    ("vllm", 1, {"sym": False}, ("all 7 layers", "sym=True only", f"checkpoint_format='{CT}'")),
    ("vllm", 1, {"sym": False, "bits": 8}, ("sym=True only", "use sym=True")),
    ("vllm", 1, {"sym": False, "bits": 8, "checkpoint_format": CT}, ("asymmetric 8-bit", "use sym=True")),
    ("vllm", 1, {"bits": 3}, ("4 and 8 bits only", f"checkpoint_format='{CT}'")),
    ("vllm", 1, {"bits": 2}, ("4 and 8 bits only", "bits=4")),
    ("vllm", 1, {"act_order": True}, ("not contiguous", "static_groups=True")),
    ("vllm", 1, {"act_order": True, "checkpoint_format": CT}, ("not contiguous", "static_groups=True")),
    ("vllm", 1, {"desc_act": True}, ("all groups are contiguous", "desc_act=false")),
    ("vllm", 1, {"group_size": 16}, ("not 16", "group_size=128")),
    ("vllm", 1, {"group_size": 48}, ("last group", "group_size=128")),
    ("vllm", 4, {"group_size": 128}, ("o_proj", "group_size 128 does not divide the 64 inputs", "group_size=64")),
    ("vllm", 3, {}, ("o_proj", "among 3 ranks", "fewer ranks")),
    ("vllm", 1, {"lm_head": True}, ("output embedding", "lm_head=False")),
    ("vllm", 1, {"model_type": "gemma3_text"}, ("float16 for gemma3_text", "torch.bfloat16")),
    *((client, 1, {"activations": RANGES}, ("v_proj: inputs", "reach 6.6e+04", "bfloat16")) for client in CLIENTS),
    ("vllm", 1, {"change": Q4}, ("q_proj (bits=8", "k_proj (bits=4", "one width")),
    ("vllm", 1, {"change": Q4, "checkpoint_format": CT}, ("q_proj (bits=8", "one width")),
    ("vllm", 1, {"change": QKV8, "rules": {r".*\.[qkv]_proj$": {"bits": 8}}}, ("qkv_proj", "the same rule")),
    ("vllm", 1, {"leave": ("self_attn.v_proj",)}, ("v_proj", "all or none", "modules_to_not_convert")),
    ("transformers", 1, {"change": DOWN8}, ("one width", "down_proj", CT)),
    ("transformers", 1, {"change": {"mlp.down_proj": {"group_size": 64}}}, ("one width and group size", "down_proj")),
    ("transformers", 1, {"lm_head": True}, ("output embedding", "lm_head=False")),
    ("transformers", 1, {"group_size": 8}, ("not 8", "group_size=128")),
    ("transformers", 1, {"model_type": "gpt2"}, ("layers of gpt2", "load_quantized")),
    ("transformers", 1, {"model_type": "gpt2", "checkpoint_format": CT}, ("Conv1D", "random", "target='vllm'")),
    ("gptqmodel", 1, {"checkpoint_format": CT}, ("not compressed-tensors", "'gptq_v2'")),
    ("gptqmodel", 1, {"group_size": 8}, ("not 8", "group_size=128")),
    ("transformers", 1, experts(), ("experts.0.gate_proj", "random values", CT, "modules_to_not_convert")),
    ("transformers", 1, {**experts(sym=False), "checkpoint_format": CT}, ("no zeros of experts", "sym=True")),
    ("transformers", 1, {**experts(leave=EXPERTS), "checkpoint_format": CT}, ("left float", "'gptq'")),
    ("transformers", 1, {**experts(change={"bits": 8}), "checkpoint_format": CT}, ("one grid", "experts.1.down_proj")),
    ("gptqmodel", 1, experts(MIXTRAL), ("experts.0.w1", "gate_proj, up_proj", "load_quantized")),
    ("gptqmodel", 1, experts(FUSED), ("gate_up_proj", "modules_to_not_convert")),
    ("vllm", 1, experts(FUSED), ("experts.0.gate_up_proj", "w1, w2, w3")),
    ("vllm", 1, experts(change={"group_size": 64}), ("experts.1.down_proj (bits=4, group_size=64", "as one")),
    ("vllm", 1, experts(leave=EXPERTS[2::3]), ("experts.0.down_proj (float)", "match all layers")),
    ("sglang", 1, {"bits": 3}, ("4 and 8 bits only", "bits=4")),
    ("sglang", 1, {"bits": 3, "checkpoint_format": CT}, ("4 and 8 bits only", "bits=4")),
    ("sglang", 1, {"sym": False}, ("sym=True only", CT)),
    ("sglang", 1, {"sym": False, "bits": 8, "checkpoint_format": CT}, ("asymmetric 8-bit", "sym=True")),
    ("sglang", 1, {"leave": ("mlp.gate_proj", "mlp.up_proj")}, ("gate_proj", "do not match its name", CT)),
    ("sglang", 1, {"leave": ("mlp.gate_proj",)}, ("gate_proj", "all or none")),
    ("sglang", 8, {"group_size": -1}, ("Marlin", "multiple of 64")),
    ("sglang", 1, {"lm_head": True}, ("output embedding",)),
    ("sglang", 1, {"group_size": 16}, ("not 16",)),
]


@pytest.mark.parametrize("client,ranks,what,words", REFUSED)
def test_a_client_s_limit_is_said_with_the_layer_the_reason_and_what_works(
    client: str, ranks: int, what: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problems(inventory(**what), Client(client, ranks))
    assert any(all(word in sentence for word in words) for sentence in found), found


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", CT])
def test_symmetric_4_bits_in_groups_of_128_are_taken_by_every_client(client: str, checkpoint_format: str) -> None:
    found = problems(inventory(checkpoint_format=checkpoint_format), Client(client))
    assert not found or (client, checkpoint_format) == ("gptqmodel", CT)


TAKEN = [
    ("vllm", 1, {"bits": 8}),
    ("vllm", 1, {"group_size": -1, "desc_act": True}),
    ("vllm", 2, {"group_size": 128}),
    ("vllm", 4, {"group_size": 64}),
    ("vllm", 4, {"group_size": -1}),
    ("vllm", 1, {"sym": False, "checkpoint_format": CT}),
    ("vllm", 1, {"bits": 3, "checkpoint_format": CT}),
    ("vllm", 1, {"change": DOWN8, "rules": {r".*down_proj$": {"bits": 8}}}),
    ("vllm", 1, {"change": QKV8, "rules": {r".*\.self_attn\.(q|k|v|qkv)_proj$": {"bits": 8}}}),
    ("vllm", 1, {"leave": ("mlp.gate_proj", "mlp.up_proj")}),
    ("vllm", 1, {"dtype": torch.bfloat16, "model_type": "gemma3_text"}),
    ("vllm", 1, {"checkpoint_format": CT, "model_type": "gpt2"}),
    ("vllm", 1, {"dtype": torch.bfloat16, "activations": RANGES}),
    ("vllm", 1, experts()),
    ("vllm", 1, experts(MIXTRAL)),
    ("vllm", 1, experts(leave=EXPERTS)),
    ("vllm", 1, {**experts(sym=False), "checkpoint_format": CT}),
    ("gptqmodel", 1, experts()),
    ("transformers", 1, experts(leave=EXPERTS)),
    ("transformers", 1, {**experts(MIXTRAL), "checkpoint_format": CT}),
    ("transformers", 1, {"bits": 3, "sym": False, "act_order": True, "group_size": 32}),
    ("transformers", 1, {"change": DOWN8, "checkpoint_format": CT}),
    ("gptqmodel", 1, {"change": DOWN8, "lm_head": True, "sym": False, "act_order": True}),
    ("sglang", 1, {"act_order": True}),
    ("sglang", 1, {"sym": False, "checkpoint_format": CT}),
]


@pytest.mark.parametrize("client,ranks,what", TAKEN)
def test_what_a_client_takes_is_not_refused(client: str, ranks: int, what: dict[str, Any]) -> None:
    assert not problems(inventory(**what), Client(client, ranks))


def test_what_a_client_asks_for_beside_the_checkpoint_is_said() -> None:
    assert "backend='torch'" in " ".join(conditions(inventory(group_size=-1), Client("transformers")))
    assert "humming" in " ".join(conditions(inventory(bits=3, checkpoint_format=CT), Client("vllm")))
    assert "CPU" in " ".join(conditions(inventory(bits=8), Client("vllm")))
    assert "scales" in " ".join(conditions(inventory(dtype=torch.bfloat16), Client("vllm")))
    assert "need AMX" in " ".join(conditions(inventory(**experts()), Client("vllm")))
    assert "experts" in " ".join(conditions(inventory(**experts()), Client("sglang")))
    assert "float32 to bfloat16" in " ".join(conditions(inventory(dtype=torch.float32), Client("vllm")))


def test_a_module_that_is_no_transformers_model_is_for_no_client() -> None:
    for client in CLIENTS:
        (only,) = problems(inventory(model_type=None), Client(client))
        assert "load_quantized" in only


def test_a_target_is_a_name_or_a_mapping_and_nothing_else() -> None:
    assert Client.of(None) is None
    assert Client.of("vllm") == Client("vllm", 1) == Client.of(Client("vllm"))
    assert Client.of({"client": "sglang", "tensor_parallel_size": 2}) == Client("sglang", 2)
    with pytest.raises(ValueError, match=r"'vllm', 'transformers', 'sglang', 'gptqmodel'; got 'vlm'"):
        Client.of("vlm")
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        Client.of({"client": "vllm", "tp": 2})
    with pytest.raises(ValueError, match="positive integer"):
        Client("vllm", 0)
    with pytest.raises(ValueError, match="for vllm and sglang"):
        Client("transformers", 2)
    with pytest.raises(TypeError, match="int"):
        Client.of(3)  # type: ignore[arg-type]


# --- on real models -----------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> Any:
    return make_llama()


def make_llama(dtype: torch.dtype = torch.float16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize(
    "options,permuted",
    [
        ({}, False),
        ({"sym": False, "checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1}, False),
        ({"desc_act": True, "static_groups": False}, True),
        ({"modules_to_not_convert": ("v_proj", "layers.1.mlp.down_proj")}, False),
        ({"dynamic": {r".*down_proj": {"bits": 8, "group_size": 16, "sym": False}, "-:.*gate_proj": {}}}, False),
        ({"lm_head": True}, False),
        ({"checkpoint_format": CT, "sym": False, "dynamic": {r".*down_proj": {"bits": 3}, "-:.*gate_proj": {}}}, False),
    ],
)
def test_what_is_planned_is_what_is_exported(
    options: dict[str, Any], permuted: bool, llama: Any, rtn: Callable[..., Any], tmp_path: Path
) -> None:
    config = QuantizeConfig(**{"group_size": 32, **options})
    planned = Inventory.of_model(llama, config)
    quantized = rtn(llama, config, permuted)
    assert Inventory.of_model(quantized, config) == planned
    exported = Checkpoint.open(export_model(quantized, tmp_path / "out", config))
    assert Inventory.of(exported) == planned


def test_an_export_for_a_client_that_would_not_take_it_is_refused_with_all_reasons(
    rtn: Callable[..., Any], tmp_path: Path
) -> None:
    config = QuantizeConfig(bits=3, group_size=16)
    quantized = rtn(make_llama(torch.float32), config)
    with pytest.raises(ExportError) as refused:
        export_model(quantized, tmp_path / "out", config, target="vllm")
    for reason in ("vllm would not take", "4 and 8 bits only", "not 16"):
        assert reason in str(refused.value)
    assert not list(tmp_path.iterdir())
    assert export_model(quantized, tmp_path / "out", config, target="gptqmodel").is_dir()


def test_conv1d_layers_as_compressed_tensors_are_for_vllm_and_not_for_transformers(
    rtn: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64)).eval()
    quantizer = QuantizeModule(group_size=32, checkpoint_format=CT)
    with pytest.raises(ExportError, match=r"layers of gpt2 are Conv1D.*target='vllm'"):
        quantizer.check_target(model, "transformers")
    folder = export_model(rtn(model, quantizer.config), tmp_path / "out", quantizer.config, target="vllm")
    with torch.no_grad():
        ids = torch.arange(32)[None]
        assert torch.equal(load_quantized(folder)(ids).logits, model(ids).logits)


def test_an_export_is_judged_again_by_the_layers_it_has(llama: Any, rtn: Callable[..., Any], tmp_path: Path) -> None:
    """Groups that the plan called contiguous and that are not."""
    config = QuantizeConfig(group_size=32)
    with Export(llama, tmp_path / "out", config, target="vllm") as export:
        quantized = rtn(llama, config, permuted=True)
        for name, module in quantized.named_modules():
            if hasattr(module, "qweight"):
                export.add(name, module)
        with pytest.raises(ExportError, match="not contiguous"):
            export.finish(quantized)
    assert not list(tmp_path.iterdir())


def test_a_quantization_for_such_a_client_does_not_begin(llama: Any, tmp_path: Path) -> None:
    def batches() -> Iterator[Any]:
        raise AssertionError("no batch was to be asked for")
        yield

    quantizer = QuantizeModule(sym=False, group_size=32)
    for export_dir in (None, tmp_path / "out"):
        with pytest.raises(ExportError, match="sym=True only"):
            quantizer.quantize(llama, batches(), export_dir=export_dir, target={"client": "vllm"})
    assert not list(tmp_path.iterdir())
    assert isinstance(llama.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_a_model_is_quantized_and_exported_for_a_client_that_takes_it(llama: Any, tmp_path: Path) -> None:
    quantizer = QuantizeModule(group_size=32, nsamples=2)
    quantizer.quantize(llama, [list(range(40)), list(range(50))], export_dir=tmp_path / "out", target="vllm")
    assert not problems(Inventory.of(Checkpoint.open(tmp_path / "out")), Client("vllm"))


def test_lightning_s_callback_refuses_before_training(tmp_path: Path) -> None:
    import lightning.pytorch as pl

    from gptq_plugin import GPTQCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_llama(torch.bfloat16)

        def training_step(self, batch: Any, _: int) -> Any:
            raise AssertionError("training was not to begin")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = [torch.arange(8) for _ in range(4)]
    callback = GPTQCallback(QuantizeModule(sym=False, group_size=32), tmp_path / "out", target="vllm")
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, max_steps=1, barebones=False
    )
    with pytest.raises(ExportError, match="sym=True only"):
        trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=2))
    assert not (tmp_path / "out").exists()


def test_transformers_trainer_s_callback_refuses_before_training(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from gptq_plugin import GPTQTrainerCallback

    rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(4)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    callback = GPTQTrainerCallback(QuantizeModule(group_size=16), tmp_path / "out", target="vllm")
    trainer = Trainer(make_llama(torch.float32), arguments, train_dataset=rows, callbacks=[callback])
    with pytest.raises(ExportError, match="not 16"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "out").exists()


def test_escalation_tries_only_what_the_client_takes(llama: Any) -> None:
    from gptq_plugin.training.attempts import Attempts
    from gptq_plugin.training.quality_gate import QualityGate

    config = QuantizeConfig(group_size=-1)
    noise = {layer.name: float(i) for i, layer in enumerate(Inventory.of_model(llama, config).layers)}

    def tried(target: Client | None) -> list[str]:
        nothing: Any = None
        until = Attempts(
            llama, QualityGate({}, "escalate", None), {}, nothing, nothing, nothing, nothing, target=target
        )
        return [step.what for step in steps(llama, config, noise) if until._may_be_tried(step)]

    assert any("more bits" in what for what in tried(None))
    for_transformers = tried(Client("transformers"))
    assert for_transformers
    mixed = [what for what in for_transformers if "more bits for" in what and "for 14 of 14" not in what]
    assert not mixed
    for_vllm = tried(Client("vllm"))
    assert for_vllm and set(for_vllm) <= set(tried(None))
