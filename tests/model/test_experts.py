"""Experts that a model keeps in one parameter are quantized one by one, and stored under the hub's names."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.checkpoint.checkpoint import Checkpoint
from gptq_plugin.clients.inventory import Inventory
from gptq_plugin.errors import CheckpointError, TargetError
from gptq_plugin.hf.quantizer import quantized_config
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.model.experts import ExpertLinear, find_experts, learn_layouts, unfused

from inventories import of_planned, of_quantized

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},  # [in, out], with biases, gate and up by turns
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64, "moe_layers": [0, 1], "head_dim": 16},  # bmm
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2},  # a module for each matrix
}  # fmt: skip
CONFIG = QuantizeConfig(bits=4, group_size=32)


def model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], "initializer_range": 0.1, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def rows(samples: int = 4, length: int = 48, seed: int = 1) -> Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(seed))


def batches() -> list[Tensor]:
    return [rows(seed=seed) for seed in range(4)]


@torch.no_grad()
def logits(network: Any) -> Tensor:
    result: Tensor = network(rows(seed=9)).logits
    return result


def in_plain_code(network: Any) -> Any:
    if network.config._experts_implementation is not None:
        network.config._experts_implementation = "eager"
    return network


class Experts(nn.Module):
    """Uses its matrices as transformers' modules do, and says nothing of itself."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        turned = use in ("matmul", "linear of the transposed", "bmm")
        self.first = nn.Parameter(torch.randn(3, *((32, 64) if turned else (64, 32))) / 6)
        self.second = nn.Parameter(torch.randn(3, *((64, 32) if turned else (32, 64))) / 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "bmm":
            return torch.bmm(torch.relu(torch.bmm(x.expand(3, -1, -1), self.first)), self.second).sum(0)
        if self.use == "einsum":
            return torch.einsum("eoi,neo->ni", self.first, torch.relu(torch.einsum("ni,eoi->neo", x, self.first)))
        out = torch.zeros_like(x)
        for number in range(len(self.first)):
            mine = x[number::2]
            hidden = torch.relu(self.product(mine, self.first[number]))
            out[number::2] += self.product(hidden, self.second[torch.tensor(number)])
        return out

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.use == "linear":
            return functional.linear(x, weight)
        if self.use == "linear of the transposed":
            return functional.linear(x, weight.T)
        return x @ (weight if self.use == "matmul" else weight.transpose(0, 1))


class Block(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.experts = Experts(use)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(self.before(x))
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_is_the_same_to_the_bit_while_experts_are_apart_and_afterwards_nothing_has_been(kind: str) -> None:
    network = model(kind)
    learn_layouts(network, lambda: logits(network))
    before, implementation = dict(network.named_parameters()), network.config._experts_implementation
    with unfused(network):
        assert any(isinstance(module, ExpertLinear) for module in network.modules())
        apart = logits(network)
    after = dict(network.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert network.config._experts_implementation == implementation
    assert torch.equal(apart, logits(in_plain_code(network)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Any, Path]]:
    """quantized(kind, checkpoint_format): the model, its report and its export; made once, and left as it is."""

    @cache
    def made(kind: str, checkpoint_format: str) -> tuple[Any, Any, Path]:
        network = model(kind)
        quantizer = QuantizeModule(bits=4, group_size=32, checkpoint_format=checkpoint_format)
        report = quantizer.quantize(network, batches())
        return network, report, quantizer.export(network, tmp_path_factory.mktemp("quantized") / "out")

    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "compressed-tensors"])
def test_an_export_loads_and_computes_what_the_model_does(kind: str, checkpoint_format: str, quantized: Any) -> None:
    network, report, out = quantized(kind, checkpoint_format)
    expert_layers = [module for module in report.quantized if "expert" in module.name or "_linear." in module.name]
    assert len(expert_layers) >= 2 * 4 and all(module.method == "gptq" for module in expert_layers)
    assert torch.equal(logits(load_quantized(out)), logits(network))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_the_tensors_have_the_names_that_the_hub_gives_them(kind: str, quantized: Any, tmp_path: Path) -> None:
    model(kind).save_pretrained(tmp_path / "float")
    _, report, out = quantized(kind, "gptq")
    with safe_open(str(tmp_path / "float" / "model.safetensors"), "pt") as file:
        stored = set(file.keys())
    with safe_open(str(out / "model.safetensors"), "pt") as file:
        ours = set(file.keys())
    layers = {name.removesuffix(".qweight") for name in ours if name.endswith(".qweight")}
    assert len(layers) == len(report.quantized)
    assert {f"{name}.weight" for name in layers} <= stored
    assert ours == (stored - {f"{name}.weight" for name in layers}) | {
        f"{name}.{suffix}" for name in layers for suffix in ("qweight", "qzeros", "scales", "g_idx")
    }


def test_from_pretrained_takes_them_too(quantized: Any) -> None:
    network, _, out = quantized("mixtral", "gptq")
    loaded = AutoModelForCausalLM.from_pretrained(out, config=quantized_config(out))
    assert torch.equal(logits(loaded), logits(network))


@pytest.mark.parametrize("use", ["linear", "matmul", "linear of the transposed", "matmul of the transposed", "bmm"])
def test_a_forward_shows_how_a_module_uses_its_matrices(use: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = Block(use).eval(), torch.randn(64, 32)
    plain = network(x)
    with unfused(network):
        assert find_experts(network) == []  # nobody has seen it run
    assert torch.equal(network(x), plain)
    quantizer = QuantizeModule(bits=8, group_size=32)
    report = quantizer.quantize(network, [x])
    assert len(report.quantized) == 1 + 2 * 3
    assert 0 < (network(x) - plain).abs().max() < 0.05 * plain.abs().max()
    out = quantizer.export(network, tmp_path / "out")
    assert torch.equal(load_quantized(out, model=Block(use))(x), network(x))


def test_what_is_used_in_another_way_stays_float_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = Block("einsum").eval()
    report = QuantizeModule(bits=4, group_size=32).quantize(network, [torch.randn(64, 32)])
    assert [module.name for module in report.quantized] == ["before"]
    assert report.coverage is not None and report.coverage.mostly_float
    assert "experts.first [3, 64, 32]" in report.coverage.summary()
    assert "not used as one expert's each" in report.coverage.summary()
    said = [record.levelname for record in caplog.records if report.coverage.summary() in record.message]
    assert "WARNING" in said  # most of the export is float


def test_experts_that_several_modules_share_stay_float() -> None:
    class Sharing(Experts):
        pass

    network = nn.Sequential(Block("linear"), Block("linear"))
    for block in network:
        block.experts = Sharing("linear")
    network[1].experts.first = network[0].experts.first
    learn_layouts(network, lambda: network(torch.randn(8, 32)))
    assert [(one.name, one.parameter) for one in find_experts(network)] == [
        ("0.experts", "second"),
        ("1.experts", "second"),
    ]
    floats = {one.name: one.reason for one in QuantizeModule(CONFIG).coverage(network).floats}
    assert floats["0.experts.first"] == "matrices of Sharing, which several modules share"


def test_routers_stay_float_unless_a_rule_is_for_them_alone() -> None:
    network = model("jetmoe")
    learn_layouts(network, lambda: logits(network))
    routers = {f"model.layers.{n}.{part}.router.layer" for n in (0, 1) for part in ("mlp", "self_attention.experts")}
    for rules in ({}, {r".*\.mlp\..*": {"bits": 8}}):
        _, skipped = QuantizeModule(QuantizeConfig(group_size=32, dynamic=rules)).check(network)
        assert {skip.name for skip in skipped if "router" in skip.reason} == routers
    targets, _ = QuantizeModule(QuantizeConfig(group_size=32, dynamic={r".*\.router\.": {"bits": 8}})).check(network)
    assert routers <= {target.name for target in targets}


def test_experts_of_one_parameter_are_quantized_alike() -> None:
    for rule in ({r".*experts\.1\..*": {"bits": 8}}, {r"-:.*experts\.0\.w3": {}}):
        with pytest.raises(TargetError, match=r"model.layers.0.mlp.experts.gate_up_proj: .*match all of them"):
            QuantizeModule(QuantizeConfig(group_size=32, dynamic=rule)).check(model("mixtral"))


def test_experts_left_float_are_together_again_and_run_by_transformers_kernels(tmp_path: Path) -> None:
    network = model("mixtral")
    quantizer = QuantizeModule(bits=4, group_size=32, modules_to_not_convert=["experts"])
    quantizer.quantize(network, batches())
    assert network.config._experts_implementation == "grouped_mm"
    assert isinstance(network.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    loaded = load_quantized(quantizer.export(network, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(network))


@pytest.mark.parametrize(
    ("kind", "checkpoint_format"), [("mixtral", "gptq"), ("qwen3_moe", "compressed-tensors"), ("gpt_oss", "gptq")]
)
def test_an_export_while_quantizing_is_the_one_made_afterwards_where_experts_stay_float(
    kind: str, checkpoint_format: str, tmp_path: Path
) -> None:
    descriptions = []
    for way in ("while", "afterwards"):
        network = model(kind)
        quantizer = QuantizeModule(
            bits=4, group_size=32, modules_to_not_convert=["experts"], checkpoint_format=checkpoint_format
        )
        quantizer.quantize(network, batches(), export_dir=tmp_path / way if way == "while" else None)
        if way == "afterwards":
            quantizer.export(network, tmp_path / way)
        assert torch.equal(logits(load_quantized(tmp_path / way)), logits(network))
        descriptions.append(description(tmp_path / way))
        with safe_open(str(tmp_path / way / "model.safetensors"), "pt") as file:
            descriptions[-1]["tensors"] = sorted(file.keys())
    assert descriptions[0] == descriptions[1]


def description(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {key: value for key, value in said.items() if key != "meta"}


@pytest.mark.parametrize("checkpoint_format", ["gptq", "compressed-tensors"])
def test_rules_for_the_models_names_hold_under_the_hubs(checkpoint_format: str, tmp_path: Path) -> None:
    network = model("mixtral")
    rule = {r"model\.layers\.\d+\.mlp\.experts\.": {"bits": 8}}
    quantizer = QuantizeModule(bits=4, group_size=32, dynamic=rule, checkpoint_format=checkpoint_format)
    quantizer.quantize(network, batches())
    out = quantizer.export(network, tmp_path / "out")
    assert torch.equal(logits(load_quantized(out)), logits(network))
    said = description(out)
    if checkpoint_format == "compressed-tensors":  # transformers takes the first group's grid for experts
        assert said["config_groups"]["group_0"]["weights"]["num_bits"] == 8
        return
    for name in ("mlp.experts.0.w1", "block_sparse_moe.experts.3.w2", "block_sparse_moe.experts"):  # vLLM: the last
        found = [rule for key, rule in said["dynamic"].items() if re.match(key, f"model.layers.1.{name}")]
        assert found[0] == {"bits": 8}
    assert not any(re.match(key, "model.layers.1.self_attn.q_proj") for key in said["dynamic"])


def test_what_servers_make_of_experts_left_float_is_told_by_the_name_they_look_up(tmp_path: Path) -> None:
    for kind, around in (("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")):
        for form in ("gptq", "compressed-tensors"):
            network = model(kind)
            quantizer = QuantizeModule(
                bits=4, group_size=32, modules_to_not_convert=["experts"], checkpoint_format=form
            )
            quantizer.round_to_nearest(network)
            said = description(quantizer.export(network, tmp_path / f"{kind}-{form}"))
            if form == "gptq":
                rules = [key.removeprefix("-:") for key in said["dynamic"] if key.startswith("-:")]
                names = [f"{around}.experts", "mlp.experts.3.gate_proj"]
            else:
                rules = [re.escape(name) if "re:" not in name else name.removeprefix("re:") for name in said["ignore"]]
                names = [f"{around}.gate", f"{around}.experts.0.w1"]
            assert all(any(re.match(rule, f"model.layers.1.{name}") for rule in rules) for name in names)
            assert not any(re.match(rule, "model.layers.1.self_attn.q_proj") for rule in rules)


@pytest.mark.parametrize("left", [(), ("experts",)])
def test_what_clients_are_asked_about_is_what_is_exported(left: tuple[str, ...], tmp_path: Path) -> None:
    network = model("qwen3_moe")
    quantizer = QuantizeModule(bits=4, group_size=32, modules_to_not_convert=left)
    planned = of_planned(network, quantizer.config)
    quantizer.round_to_nearest(network)
    assert of_quantized(network, quantizer.config) == planned
    assert Inventory.of(Checkpoint.open(quantizer.export(network, tmp_path / "out"))) == planned


def test_routers_are_told_to_clients_that_would_quantize_them(tmp_path: Path) -> None:
    network = model("mixtral")
    quantizer = QuantizeModule(bits=4, group_size=32, checkpoint_format="compressed-tensors")
    quantizer.round_to_nearest(network)
    ignored = description(quantizer.export(network, tmp_path / "out"))["ignore"]
    assert {f"model.layers.{n}.{around}.gate" for n in (0, 1) for around in ("mlp", "block_sparse_moe")} < set(ignored)


def test_a_failure_leaves_the_experts_as_they_were() -> None:
    network = model("qwen3_moe")
    before = dict(network.named_parameters())

    def fail(done: int, total: int, what: str) -> None:
        if "experts.2" in what:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        QuantizeModule(CONFIG).quantize(network, batches(), progress=fail)
    after = dict(network.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert not any(isinstance(module, (ExpertLinear, QuantLinear)) for module in network.modules())


@pytest.fixture
def lopsided() -> Any:
    """Its router sends nothing to expert 3."""
    network = model("qwen3_moe", num_hidden_layers=1)

    def elsewhere(router: nn.Module, args: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(y if y.is_floating_point() else torch.where(y == 3, 0, y) for y in outputs)

    network.model.layers[0].mlp.gate.register_forward_hook(elsewhere)
    return network


def test_an_expert_without_tokens_takes_those_of_the_layer_and_behind_them_is_rounded(lopsided: Any) -> None:
    report = QuantizeModule(CONFIG).quantize(lopsided, batches())
    by_name = {module.name.removeprefix("model.layers.0.mlp.experts."): module for module in report.quantized}
    assert by_name["0.gate_proj"].tokens > 32 and by_name["3.gate_proj"].tokens == 0
    for name in ("3.gate_proj", "3.up_proj"):
        assert by_name[name].method == "gptq" and "all tokens of the layer" in by_name[name].deviations[0]
    assert by_name["3.down_proj"].method == "rtn" and "round-to-nearest" in " ".join(by_name["3.down_proj"].deviations)
    assert by_name["0.down_proj"].damp_percent >= 0.01


def test_layers_behind_few_tokens_are_damped_more_and_reported() -> None:
    network = model("mixtral")
    report = QuantizeModule(CONFIG).quantize(network, [rows(2, 40)])
    few = [module for module in report.quantized if "w2" in module.name and 0 < module.tokens < 96]
    assert few and all(m.damp_percent == min(0.9, 0.3 * (96 / m.tokens) ** 1.5) for m in few)
    assert all("routed to this expert" in m.deviations[0] for m in few)
    assert any("layers of experts are damped more" in deviation for deviation in report.all_deviations())


def test_more_tokens_than_calibration_saw_lose_less_than_with_the_experts_tokens_alone() -> None:
    """The reason for weighting in: errors on tokens that were not seen."""
    errors: dict[str, float] = {}
    for method in ("weighted", "alone"):
        network = model("mixtral", num_hidden_layers=1)
        names = [f"model.layers.0.mlp.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3")]
        with unfused(network):
            floats = {name: network.get_submodule(name).weight.detach().clone() for name in names}
        with pytest.MonkeyPatch.context() as patch:
            if method == "alone":
                patch.setattr("gptq_plugin.walk.expert_hessians.ExpertHessians.reads_tokens", lambda *_: False)
                patch.setattr("gptq_plugin.walk.expert_hessians._DAMPING", 0.0)
            QuantizeModule(QuantizeConfig(bits=3, group_size=32)).quantize(network, [rows(1, 70)])
        seen: dict[str, Tensor] = {}
        for name in names:
            network.get_submodule(name).register_forward_pre_hook(partial(_remember, seen, name))
        network(rows(64, 64, seed=5))
        errors[method] = sum(
            float((seen[n] @ (floats[n] - network.get_submodule(n).dequantize()).T).square().sum()) for n in names
        )
    assert errors["weighted"] < errors["alone"]


def _remember(seen: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[name] = args[0]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_no_token_of_an_expert(kind: str) -> None:
    """The experts of a layer count the tokens of a batch as often with padding around them as without."""
    ids, padding = rows(2, 40).clamp(min=1), torch.zeros(2, 9, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([ids, padding], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), padding], 1),
    }
    counts: list[Counter[str]] = []
    for data in ({"input_ids": ids}, padded):
        report = QuantizeModule(CONFIG).quantize(model(kind), [data])
        counts.append(Counter())
        for module in report.quantized:  # a token near two experts may go to the other one
            counts[-1][re.sub(r"\.\d+(?=\.\w+$|$)", ".*", module.name)] += module.tokens
        assert not any("padding" in deviation for deviation in report.all_deviations())
    assert counts[0] == counts[1]


def test_an_expert_that_is_missing_in_a_checkpoint_is_refused(quantized: Any, tmp_path: Path) -> None:
    out = shutil.copytree(quantized("mixtral", "gptq")[2], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["num_local_experts"] = 5
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj .*experts.4.w1.* are not quantized"):
        load_quantized(out)


class Listed(nn.Module):
    """Experts in a list, as code that came with a checkpoint has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 8, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        best, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts[:7]):
            if (best == number).any():
                out[best == number] += expert(x[best == number])
        return out


def test_experts_in_a_list_are_treated_alike() -> None:
    torch.manual_seed(0)
    report = QuantizeModule(bits=4, group_size=32).quantize(nn.Sequential(Listed()), [torch.randn(400, 32)])
    by_name = {module.name: module for module in report.modules}
    assert by_name["0.gate"].method == "float" and "router" in by_name["0.gate"].reason
    assert by_name["0.experts.7.0"].method == "gptq" and by_name["0.experts.7.0"].tokens == 0
    assert by_name["0.experts.7.2"].method == "rtn"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_experts_are_quantized_and_load_there(kind: str, tmp_path: Path) -> None:
    network = model(kind).to("cuda")  # in 16 bits, a router's choice may depend on the order of sums
    quantizer = QuantizeModule(CONFIG)
    report = quantizer.quantize(network, batches())
    assert all(module.method == "gptq" for module in report.quantized if module.tokens)
    loaded = load_quantized(quantizer.export(network, tmp_path / "out"), device="cuda")
    ids = rows(seed=9).cuda()
    with torch.no_grad():
        expected, found = network(ids).logits, loaded(ids).logits
    # The sums over experts are atomic additions there, in any order.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "jetmoe"])
@pytest.mark.parametrize("offload", [True, False])
def test_experts_on_the_cpu_are_quantized_on_a_gpu_to_the_same_codes(kind: str, offload: bool) -> None:
    there, streamed = model(kind), model(kind)
    QuantizeModule(CONFIG).quantize(there.cuda(), batches())
    QuantizeModule(CONFIG, offload_weights=offload).quantize(streamed, batches(), device="cuda")
    assert all(tensor.device.type == "cpu" for tensor in streamed.state_dict().values())
    for name, tensor in streamed.state_dict().items():
        if name.endswith("qweight"):
            assert torch.equal(tensor, there.state_dict()[name].cpu()), name
