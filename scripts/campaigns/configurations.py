"""Configurations, right and odd: what is accepted acts, and what is refused is named.

Hypothesis makes the cases (the strategies are in `values`, `rules` and `command_lines`): fields of `QuantizeConfig`,
`dynamic` rules, arguments of the callbacks and of `quantize`, descriptions that other tools wrote, and YAML. Accepted
fields and rules quantize a model, whose layers must then have what was asked for, in memory and in an
export whose JSON another tool has sorted.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from campaigns import command_lines, rules
from campaigns.campaign import Campaign, Case, Wrong, names
from campaigns.examples import examples
from campaigns.json_damage import ODD as ODD_JSON
from campaigns.values import ODD, RIGHT, odd
from hypothesis import strategies as st
from torch import nn

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.autogptq import BaseQuantizeConfig
from gptq_plugin.layers.packing import unpack_zeros
from gptq_plugin.layers.qlinear import QuantLinear
from gptq_plugin.options.fields import shown

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
Values = dict[str, Any]

_FIELDS = st.tuples(
    st.just("fields"),
    st.fixed_dictionaries({}, optional=RIGHT),
    st.dictionaries(st.sampled_from(sorted(RIGHT)), odd(), max_size=2),
    st.sampled_from(["config", "from_dict", "module", "yaml", "quantize_config"]),
)

# Arguments, with values that are right; odd ones are put among them.
_SHARED: Values = {
    "export_dir": ["out", Path("x"), None], "tokenizer": [None], "calibration": [None, "train", "val"], "mix": [None],
    "mix_fraction": [0, 0.25], "swap": [None, True], "overwrite": [True, False], "target": [None, "vllm"],
}  # fmt: skip
_ARGUMENTS: dict[str, Values] = {
    "GPTQCallback": {
        **_SHARED, "calibration_step": [None], "module": [None, "", "net"], "weights": ["last", "best", "a.ckpt"],
        "validate": [None, True], "max_degradation": [None, {"val_loss": 0.1}], "on_fail": ["raise", "warn"],
        "max_bits": [None, 5, 4.5], "quantizer": [],
    },
    "GPTQTrainerCallback": {**_SHARED, "forward": [None], "quantizer": []},
    "QuantizeModule": {
        "config": [None, QuantizeConfig()], "offload_weights": [None, True], "offload_activations": [None, False],
        "exact_sums": [None, True], "cache_dir": [None], "cache_gb": [50.0, 1],
    },
    "quantize": {
        "forward": [None], "nsamples": [None, 48], "device": [None, "cpu"], "device_memory": [None, 10**9],
        "export_dir": [None], "overwrite": [False], "target": [None], "progress": [None], "tokenizer": [None],
        "batches": [],
    },
}  # fmt: skip
_OTHER_WORDS = {"mix": "calibration data", "batches": "calibration", "export_dir": "an export to"}


@st.composite
def _arguments(draw: st.DrawFn) -> tuple[str, str, Values, str]:
    what = draw(st.sampled_from(sorted(_ARGUMENTS)))
    right = {name: st.sampled_from(values) for name, values in _ARGUMENTS[what].items() if values}
    wrong = draw(st.sampled_from(sorted(_ARGUMENTS[what])))
    given = draw(st.fixed_dictionaries({}, optional=right))
    return "arguments", what, {**given, wrong: draw(odd())}, wrong


_NAMES = (
    "bits", "group_size", "sym", "desc_act", "static_groups", "damp_percent", "damp_auto_increment", "true_sequential",
    "lm_head", "dynamic", "meta", "quant_method", "checkpoint_format", "format", "pack_dtype", "modules_to_not_convert",
    "model_name_or_path", "model_file_base_name", "is_marlin_format", "dataset", "tokenizer", "block_name_to_quantize",
    "module_name_preceding_first_block", "batch_size", "pad_token_id", "use_cuda_fp16", "model_seqlen",
    "exllama_config",
    "cache_block_outputs", "modules_in_block_to_quantize", "use_exllama", "max_input_length", "backend", "clip_ratios",
    "adapter", "v2", "mse", "nsamples", "seed", "token_weighting", "zero_point", "version", "w_bit", "kv_cache_scheme",
)  # fmt: skip


@st.composite
def _description(draw: st.DrawFn) -> tuple[str, int, dict[str, Any]]:
    values = st.sampled_from(range(len(ODD_JSON))).map(ODD_JSON.__getitem__)
    return "description", draw(st.integers(0, 99)), draw(st.dictionaries(st.sampled_from(_NAMES), values, max_size=3))


_CASES = (
    _FIELDS, _arguments(), rules.cases(), _description(), command_lines.yaml_texts(), _FIELDS, _arguments(),
    rules.cases(), _FIELDS,
)  # fmt: skip

_descriptions: list[Values] = []


def _prepare(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for file in sorted(FIXTURES.glob("*/*.json")):
        content = json.loads(file.read_text())
        described = content if file.name == "quantize_config.json" else content.get("quantization_config")
        if described and described.get("quant_method", "gptq") == "gptq":
            _descriptions.append(described)
    QuantizeModule(group_size=16).quantize(_model(), _data())


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def _data() -> list[torch.Tensor]:
    return list(torch.randn(16, 4, 32, generator=torch.Generator().manual_seed(1)))


def _attack(case: Case, given: Any) -> None:
    _ATTACKS[given[0]](case, *given[1:])


def _fields(case: Case, right: Values, wrong: Values, way: str) -> None:
    fields = {**right, **wrong}
    case.is_of(f"{way} {_shown(fields)}")
    quantizer = case.attempt(f"fields by {way}", lambda: _made(fields, way), names(*fields))
    if quantizer is not None:
        case.attempt("quantize", lambda: _quantized(quantizer, _model(), _data()), names(*fields))


def _made(fields: Values, way: str) -> QuantizeModule:
    if way == "module":
        return QuantizeModule(**fields)
    config = QuantizeConfig.from_dict(fields) if way == "from_dict" else QuantizeConfig(**fields)
    if way == "yaml" and QuantizeConfig.from_yaml(config.to_yaml()) != config:
        raise Wrong("its YAML is another configuration")
    if way == "quantize_config":
        content = json.loads(json.dumps(config.to_quantize_config()))
        if QuantizeConfig.from_quantize_config(content) != config:
            raise Wrong("its quantize_config.json is another configuration")
    return QuantizeModule(config)


def _quantized(quantizer: QuantizeModule, model: nn.Module, data: list[torch.Tensor]) -> nn.Module:
    """The model, whose layers have the grids that the configuration asks for."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = quantizer.quantize(model, data)
    told = {module.name: module for module in report.modules}
    for name in names:
        layer, own = model.get_submodule(name), quantizer.config.for_module(name)
        kept = own is None or name in quantizer.config.modules_to_not_convert
        if isinstance(layer, QuantLinear) != (not kept) and not (isinstance(layer, nn.Linear) and told[name].reason):
            raise Wrong(f"{name} is a {type(layer).__name__}")
        if isinstance(layer, QuantLinear) and own is not None:
            zeros = unpack_zeros(layer.qzeros, layer.bits, layer.out_features)
            symmetric = bool((zeros == 2 ** (layer.bits - 1)).all())
            if (layer.bits, layer.group_size) != (own.bits, own.group_size_for(32)) or (own.sym and not symmetric):
                raise Wrong(f"{name} has {layer.bits} bits in groups of {layer.group_size}, symmetric: {symmetric}")
    if not model(data[0]).isfinite().all():
        raise Wrong("outputs hold NaN or infinity")
    return model


def _rules(case: Case, dynamic: dict[str, Values], known: bool) -> None:
    case.is_of(_shown(dynamic))

    def quantize() -> None:
        model = rules.model()
        quantizer = QuantizeModule(group_size=16, clip_ratios=(1.0,), dynamic=dynamic)
        _quantized(quantizer, model, _data())
        if known:
            rules.compare(model, dynamic)
        inputs = _data()[0]
        folder = quantizer.export(model, case.folder / "out")
        for file in (folder / "config.json", folder / "quantize_config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True))  # as transformers does
        again = load_quantized(folder, model=rules.model())
        if not torch.equal(again(inputs), model(inputs)):
            raise Wrong("the export computes something else")

    case.attempt("rules", quantize, names("dynamic"))


def _given(case: Case, what: str, arguments: Values, wrong: str) -> None:
    case.is_of(f"{what}: {wrong} = {_shown(arguments[wrong])} among {sorted(arguments)}")

    def call() -> None:
        if what == "quantize":
            data = {"batches": _data(), **arguments}
            QuantizeModule(group_size=16, nsamples=64).quantize(_model(), **data)
        elif what == "QuantizeModule":
            QuantizeModule(**arguments).quantize(_model(), _data())
        else:
            kind = GPTQCallback if what == "GPTQCallback" else GPTQTrainerCallback
            callback = kind(**{"quantizer": QuantizeModule(group_size=16, nsamples=64), **arguments})
            if isinstance(callback, GPTQCallback) and not isinstance(arguments.get("export_dir"), (str, bytes)):
                _fit(callback)

    case.attempt(what, call, names(_OTHER_WORDS.get(wrong, wrong), *arguments))


def _fit(callback: GPTQCallback) -> None:
    """A run of two steps, at whose end the callback quantizes."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self(batch).square().mean()
            self.log("val_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    loader = torch.utils.data.DataLoader(torch.cat(_data()), batch_size=8)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        trainer = lightning.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(Module(), loader)


def _described(case: Case, number: int, changes: Values) -> None:
    values = {**_descriptions[number % len(_descriptions)], **changes}
    case.is_of(f"description {number % len(_descriptions)} with {_shown(changes)}")

    def read() -> None:
        config = QuantizeConfig.from_quantize_config(values)
        if QuantizeConfig.from_quantize_config(json.loads(json.dumps(config.to_quantize_config()))) != config:
            raise Wrong("written and read it is another configuration")

    case.attempt("from_quantize_config", read, names(*changes))
    try:
        (case.folder / "quantize_config.json").write_text(json.dumps(values))
    except (ValueError, RecursionError):
        return
    case.attempt("BaseQuantizeConfig", lambda: BaseQuantizeConfig.from_pretrained(case.folder), names(*changes, "JSON"))


def _shown(value: Any) -> str:
    """The value on one line; one of `ODD` by its place."""
    places = {id(one): number for number, one in enumerate(ODD)}
    if isinstance(value, dict) and id(value) not in places:
        return ", ".join(f"{key}={_shown(own)}" for key, own in value.items())
    is_listed = id(value) in places and type(value) not in (int, str, bool, type(None))
    return f"ODD[{places[id(value)]}]" if is_listed else shown(value).encode("ascii", "backslashreplace").decode()


_ATTACKS: dict[str, Callable[..., None]] = {
    "fields": _fields,
    "arguments": _given,
    "rules": _rules,
    "description": _described,
    "yaml": command_lines.attack_yaml,
}

CAMPAIGN = Campaign(
    about="configurations, arguments, rules and YAML",
    cases=6000,
    few=30,
    given=lambda seed, count: examples(_CASES, seed, count),
    attack=_attack,
    prepare=_prepare,
)
