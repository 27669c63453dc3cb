"""Damaged and hostile checkpoints through load, check and convert.

A case is a checkpoint of another tool or of this package with one to three mutations, structural ones: changes of
single bytes, as coverage-guided fuzzers make them, nearly all end in safetensors' and json's parsers, which are not
ours (`bits` and `text` make some). Afterwards it computes what it did, to the bit; or other numbers if the files now
describe these; or is refused by an error that names the file. What is converted computes what is loaded.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from campaigns import file_damage, json_damage, size_damage, tensor_damage
from campaigns.campaign import Campaign, Case, Wrong, message_fault, own_error
from campaigns.damage import Damage
from campaigns.examples import randoms
from campaigns.watch import beginning, nothing_outside, untouched
from torch import Tensor, nn

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized, quantized_config
from gptq_plugin.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from gptq_plugin.check.lint import lint
from gptq_plugin.errors import CheckpointError
from gptq_plugin.export.convert import convert
from gptq_plugin.export.unloaded import Unloaded
from gptq_plugin.report.base_card import base_license

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
IDS = torch.arange(3, 15)[None]
_PLAIN = "a plain module"

_MUTATIONS: tuple[Callable[[Path, Random], Damage], ...] = (
    json_damage.field, json_damage.field, json_damage.quantization_field, json_damage.quantization_field,
    json_damage.quantization_field, json_damage.model_field, json_damage.model_field, json_damage.text,
    tensor_damage.tensor, tensor_damage.tensor, tensor_damage.tensor, tensor_damage.tensor, tensor_damage.header,
    tensor_damage.header, tensor_damage.bits, tensor_damage.cut, file_damage.shards, file_damage.shards,
    file_damage.special, file_damage.special, file_damage.secret, file_damage.names, file_damage.card,
    size_damage.sparse, size_damage.values, size_damage.rules, size_damage.header, size_damage.files,
)  # fmt: skip
_OF_FLOATS: tuple[Callable[[Path, Random], Damage], ...] = (
    tensor_damage.tensor, tensor_damage.tensor, tensor_damage.header, tensor_damage.bits, tensor_damage.cut,
    file_damage.shards, file_damage.special, size_damage.sparse, size_damage.header, size_damage.files,
)  # fmt: skip
_TIED, _FLOAT = "tied", "float"  # an export, and the model that it was made from

_bases: dict[str, Path] = {}
_others: dict[str, Path] = {}
_logits: dict[str, Tensor] = {}


class CannotRun(Exception):
    """A model was loaded and does not run: a value may be so, but its code cannot use it, or it is far too large."""


def plain() -> nn.Module:
    """A module that transformers does not know."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def _prepare(folder: Path) -> None:
    """Checkpoints of all tools, and what they compute."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    _bases.update({made.name: made for made in sorted(FIXTURES.iterdir()) if made.is_dir()})
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    llama = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    mixtral = transformers.MixtralConfig(**sizes, **experts)
    for kind, model, checkpoint_format in (
        (_TIED, transformers.LlamaForCausalLM._from_config(llama, dtype=torch.bfloat16), "gptq"),
        ("experts", transformers.MixtralForCausalLM._from_config(mixtral, dtype=torch.bfloat16), "compressed-tensors"),
        (_PLAIN, plain(), "gptq_v2"),
    ):
        asymmetric = {"0": {"sym": False}} if kind == _PLAIN else {r"model.layers.0.*v_proj": {"sym": False}}
        config = QuantizeConfig(
            group_size=32, clip_ratios=(1.0,), nsamples=128, checkpoint_format=checkpoint_format, dynamic=asymmetric
        )
        data = [torch.randn(16, 64) for _ in range(16)] if kind == _PLAIN else torch.randint(3, 128, (8, 32)).tolist()
        if kind == _TIED:
            model.save_pretrained(_others.setdefault(_FLOAT, folder / _FLOAT))
        quantizer = QuantizeModule(config)
        quantizer.quantize(model.eval(), data)
        _bases[kind] = quantizer.export(model, folder / kind)
    _logits.update({name: _computed(name, base) for name, base in _bases.items()})


def _computed(base: str, folder: Path) -> Tensor:
    """What a checkpoint computes, loaded by us."""
    if base == _PLAIN:
        return _outputs(load_quantized(folder, model=plain()))
    return _outputs(load_quantized(folder))


def _outputs(model: nn.Module) -> Tensor:
    try:
        with torch.no_grad():
            if isinstance(model, transformers.PreTrainedModel):
                values: Tensor = model(input_ids=IDS).logits
            else:
                values = model(torch.linspace(-1, 1, 64)[None])
    except Exception as error:
        raise CannotRun(f"{type(error).__name__}: {error}") from error
    if not values.isfinite().all():
        raise CannotRun("its outputs hold NaN or infinity")
    return values


def _attack(case: Case, rng: Random) -> None:
    base = rng.choice(sorted(_bases))
    folder = case.folder / "checkpoint"
    secret = case.folder / "secret"
    secret.mkdir()
    (secret / "key").write_text("a key")
    shutil.copytree(_bases[base], folder)
    damages = [_mutate(folder, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    case.is_of(f"{base}: {'; '.join(damage.what for damage in damages)}")
    changes = any(damage.changes for damage in damages)

    def attempt(name: str, run: Callable[[], Any], objection: Callable[[Exception], str] | None = None) -> Any:
        def watched() -> Any:
            with untouched(folder), untouched(secret), nothing_outside(case.folder):
                return run()

        return case.attempt(name, watched, objection or (lambda error: _objection(error, folder, damages)))

    def load() -> Tensor:
        found = _computed(base, folder)
        if not changes and not torch.equal(found, _logits[base]):
            raise Wrong(f"other outputs, by up to {_distance(found, _logits[base])}")
        return found

    loaded = attempt("load", load)
    attempt("check", lambda: _check(folder))
    out = case.folder / "out"
    attempt("convert", lambda: _convert(folder, out, loaded, base))
    if rng.random() < 0.25:
        # transformers reads before we do, and raises what it raises; but it must not hang, nor load other numbers.
        attempt("transformers", lambda: _by_transformers(folder, loaded, base), lambda error: "")
    if rng.random() < 0.25:
        beside = shutil.copytree(_others[_FLOAT], case.folder / _FLOAT)
        damage = rng.choice(_OF_FLOATS)(beside, rng)
        case.is_of(f"{base}: {'; '.join(one.what for one in damages)}; beside a float model: {damage.what}")
        case.attempt("beside", lambda: lint(_bases[_TIED], beside), lambda error: _objection(error, beside, []))
    if rng.random() < 0.25:
        # AutoGPTQ's entry takes no plain module, damaged or not.
        plain = (lambda error: _objection(error, folder, [])) if base == _PLAIN else None
        attempt("autogptq", lambda: _by_autogptq(folder, loaded, base), plain)
        attempt("float model", lambda: _as_float(folder))


def _mutate(folder: Path, rng: Random) -> Damage:
    mutation = rng.choice(_MUTATIONS)
    try:
        return mutation(folder, rng)
    except Exception as error:  # noqa: BLE001  what an earlier mutation made impossible
        return Damage(f"({mutation.__name__} was not possible: {type(error).__name__})", changes=True)


def _objection(error: Exception, folder: Path, damages: list[Damage]) -> str:
    """A refusal names the file, and the field where only one field of a description was changed."""
    if isinstance(error, CannotRun) and any(damage.changes for damage in damages):
        return ""
    message = str(error)
    fault = own_error(error) or message_fault(message, 20_000)
    if fault:
        return fault
    if not any(file.name in message for file in folder.iterdir()) and str(folder) not in message:
        return "names no file"
    told = isinstance(error, CheckpointError) and len(damages) == 1
    if told and damages[0].field and damages[0].field not in message and "model.layers" not in message:
        return f"does not name {damages[0].field}"
    return ""


def _distance(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shape {list(one.shape)} instead of {list(other.shape)}"
    return f"{float((one.double() - other.double()).abs().max()):.3g}"


def _check(folder: Path) -> None:
    found = lint(folder)
    if found.errors:
        raise CheckpointError(f"{folder}: {found.errors[0]}")


def _convert(folder: Path, out: Path, loaded: Tensor | None, base: str) -> None:
    """Writes the checkpoint in another format, in which it must compute the same."""
    described = json.loads((_bases[base] / "config.json").read_text())["quantization_config"]
    compressed = described["quant_method"] == "compressed-tensors"
    convert(folder, out, "gptq_v2" if compressed else "compressed-tensors")
    links = [path.name for path in out.rglob("*") if path.is_symlink()]
    published = [path.name for path in out.rglob("*") if path.is_file() and b"a key" in beginning(path)]
    if links or published:
        raise Wrong(f"published {links or published}")
    if loaded is not None and not torch.equal(_computed(base, out), loaded):
        raise Wrong("it computes something else than before it was converted")


def _by_transformers(folder: Path, loaded: Tensor | None, base: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=quantized_config(folder))
    if loaded is not None and base != _PLAIN:
        _compare(_outputs(model.eval()), loaded, "load_quantized")


def _by_autogptq(folder: Path, loaded: Tensor | None, base: str) -> None:
    BaseQuantizeConfig.from_pretrained(folder)
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu")
    if loaded is not None:
        _compare(_outputs(model.model.eval()), loaded, "load_quantized")


def _as_float(folder: Path) -> None:
    """The folder where one of a float model is expected."""
    base_license(str(folder), None)
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    config._name_or_path = str(folder)
    model = transformers.LlamaForCausalLM(config)
    unloaded = Unloaded.of(model)
    for name in unloaded.tensors:
        unloaded.read(name)
    lint(_bases["gptqmodel-w4g32-v2"], folder)


def _compare(found: Tensor, loaded: Tensor, by: str) -> None:
    if not torch.equal(found, loaded):
        raise Wrong(f"other outputs than with {by}, by up to {_distance(found, loaded)}")


CAMPAIGN = Campaign(
    about="checkpoints of all formats: load, check, convert",
    cases=2400,
    few=30,
    given=randoms,
    attack=_attack,
    prepare=_prepare,
)
