"""README.md of an export: a Hugging Face model card that describes the folder and how to load it.

Cards are published: no path of this machine enters one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from gptq_plugin.config import QUANTIZER_NAME
from gptq_plugin.model.hf_models import is_transformers, published_class
from gptq_plugin.options.methods import METHOD_FIELDS
from gptq_plugin.report.base_card import License, base_license
from gptq_plugin.report.card_metadata import metadata
from gptq_plugin.report.figures import bit_widths, bits_label, metric_values, spread_notes
from gptq_plugin.report.markdown import code, escaped, snippet, table
from gptq_plugin.report.numbers import format_bits_per_weight, format_bytes, format_value
from gptq_plugin.report.report import QuantizeReport

# The hub's task: transformers' table of classes for it, and the auto class that loads them.
_TASKS = {
    "text-generation": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "image-text-to-text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "text-classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
    "token-classification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "AutoModelForTokenClassification"),
    "question-answering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "AutoModelForQuestionAnswering"),
    "fill-mask": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "image-classification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
    "automatic-speech-recognition": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
}
_HUB_ID = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ModelFacts:
    """The model's part of a card, apart from its quantization.

    Attributes:
        name: Its class.
        loader: The transformers class that loads it; None for a plain module or a class unknown to transformers.
        dtype: Dtype of its float tensors.
        base_model: Hugging Face id of the model it was trained from, if known.
        pipeline_tag: The hub's name of its task, if known.
        model_type: transformers' name of the architecture, if it has one.
        base_license: License of the base model, if known.
        has_tokenizer: True if the export's folder holds a tokenizer.
    """

    name: str
    loader: str | None = None
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    pipeline_tag: str | None = None
    model_type: str | None = None
    base_license: License | None = None
    has_tokenizer: bool = False


def model_facts(model: Any, folder: Path | None = None) -> ModelFacts:
    """The facts of a model in memory, as its export shows them.

    Args:
        model: What was quantized.
        folder: The export, if it is written already.
    """
    has_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    if not is_transformers(model):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return ModelFacts(type(model).__name__, dtype=dtype, has_tokenizer=has_tokenizer)
    source = getattr(model.config, "_name_or_path", None)
    base_model = hub_id(source)
    facts = ModelFacts(
        type(model).__name__,
        dtype=model.dtype,
        base_model=base_model,
        base_license=base_license(source, base_model, getattr(model.config, "license", None)),
        has_tokenizer=has_tokenizer,
    )
    kind = published_class(model)
    if kind is None or getattr(model.config, "auto_map", None):  # a class defined outside of transformers
        return facts
    from transformers.models.auto import modeling_auto

    facts = replace(facts, name=kind.__name__, loader=kind.__name__, model_type=model.config.model_type)
    for task, (mapping, loader) in _TASKS.items():
        if kind.__name__ in getattr(modeling_auto, mapping, {}).values():
            return replace(facts, loader=loader, pipeline_tag=task)
    return facts


def hub_id(name: str | None) -> str | None:
    """`name` if it is an id on the hub (``org/name``); None if it may be a path of this machine."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def heading(report: QuantizeReport, facts: ModelFacts) -> str:
    """The export's title, on its card and its page."""
    name = facts.base_model.rpartition("/")[2] if facts.base_model else facts.name
    return f"{name}, {bits_label(report)} GPTQ"


def model_card(
    report: QuantizeReport, settings: Mapping[str, Any], facts: ModelFacts, loading: Sequence[str] = ()
) -> str:
    """The text of README.md: YAML metadata, then Markdown.

    Args:
        report: The quantization's.
        settings: How the layers are quantized, in `QuantizeConfig`'s terms (`Format.settings`).
        facts: The model's.
        loading: A section for every client that has one: how it loads the export, or why it does not.
    """
    sections = [
        f"---\n{yaml.safe_dump(_metadata(report, facts), sort_keys=False, allow_unicode=True)}---",
        f"# {escaped(heading(report, facts))}",
        _summary(report, facts),
        "## License",
        _license(facts),
        "## Quantization",
        table(("option", "value"), _options(settings, report)),
        *_allocation(report),
        *_finish(report),
        "## Calibration",
        _calibration(report),
        *_metrics(report),
        "## Differences from the request",
        _deviations(report),
        "## How to load it",
        "In this folder (`.`); elsewhere, put its path in place of the dot.",
        _here(facts),
        *_generate(facts),
        *loading,
        "## Upload it",
        snippet("hf", f"hf auth login\nhf upload YOUR_NAME/{_repository(report, facts)} .", "bash"),
    ]
    return "\n\n".join(sections) + "\n"


# --- contents -----------------------------------------------------------------------------------------------


def _metadata(report: QuantizeReport, facts: ModelFacts) -> dict[str, Any]:
    return metadata(
        report,
        heading(report, facts),
        base_model=facts.base_model,
        base_license=facts.base_license,
        library=QUANTIZER_NAME if facts.loader is None else "transformers",
        pipeline_tag=facts.pipeline_tag,
    )


def _summary(report: QuantizeReport, facts: ModelFacts) -> str:
    origin = f" It comes from [{facts.base_model}](https://hf.co/{facts.base_model})." if facts.base_model else ""
    totals = report.totals()
    ratio = totals["loss"] / totals["rtn_loss"] if totals["rtn_loss"] else float("nan")
    compared = f" Their loss is {format_value(ratio, 3)} of round-to-nearest's." if format_value(ratio) else ""
    whole = ""
    if report.size is not None:
        before = f" ({format_bytes(report.coverage.float_model)} before)" if report.coverage is not None else ""
        size = format_bytes(report.size.bytes)
        whole = f" The whole export is {size}{before}, of which {report.float_share:.1%} are float."
    bits = format_bits_per_weight(report.bits_per_weight)
    return (
        f"A `{facts.name}` whose linear layers were quantized with GPTQ by {QUANTIZER_NAME}.{origin} "
        f"{totals['modules']} layers are quantized, {totals['modules_float']} left in {_dtype(facts.dtype)}.{whole} "
        f"The quantized ones take {format_bytes(report.stored_bytes)}, {bits}; "
        f"in 16 bits they would take {format_bytes(2 * report.weights)}.{compared} `report.html` shows every layer."
    )


def _license(facts: ModelFacts) -> str:
    known = facts.base_license
    if known is None:
        whose = f"the card of {facts.base_model} was not on disk" if facts.base_model else "no base model is known"
        return (
            f"**Unknown**: {whose}. Before this folder is published, its license belongs here and, as `license:`, into "
            "the metadata above; that of a base model binds its quantized copies too."
        )
    name = known.name or known.id
    text = f"[{escaped(name)}]({known.link})" if known.link else f"`{name}`"
    return f"{text}, that of the base model, as its card has it."


def _options(settings: Mapping[str, Any], report: QuantizeReport) -> list[tuple[str, str]]:
    names = ("bits", "group_size", "sym", "desc_act", "lm_head", "checkpoint_format", "dynamic")
    options = [(f"`{name}`", code(settings[name])) for name in names if name in settings]
    request = report.config
    return [
        *options,
        *((f"`{name}`", code(request.to_dict()[name])) for name in ("static_groups", "method", *METHOD_FIELDS)),
    ]


def _finish(report: QuantizeReport) -> list[str]:
    return [] if report.finish is None else ["## Finish", f"{escaped(report.finish.summary())}."]


def _allocation(report: QuantizeReport) -> list[str]:
    if report.allocation is None:
        return []
    head, *rows = report.allocation.rows()
    return [
        "## Bits at a budget",
        f"{report.allocation.summary()}. KL(float || model) with these layers alone quantized, in nats: on the grid "
        "that was chosen, and as measured at each width.",
        table(head, [[escaped(cell) for cell in row] for row in rows]),
    ]


def _calibration(report: QuantizeReport) -> str:
    if not report.tokens:
        return "None: the weights were rounded to nearest."
    origin = f"{escaped(report.calibration)}: " if report.calibration else ""
    digest = f" Their SHA-256 is `{report.calibration_sha256}`." if report.calibration_sha256 else ""
    return f"{origin}{report.samples:,} samples, {report.tokens:,} tokens.{digest}"


def _metrics(report: QuantizeReport) -> list[str]:
    rows = [(escaped(m.metric), escaped(m.model), format_value(m.value, 5), *m.shown) for m in metric_values(report)]
    if not rows:
        return []
    shown = table(("metric", "model", "value", "change", "relative"), rows)
    return ["## Before and after", shown, *map(escaped, spread_notes(report))]


def _deviations(report: QuantizeReport) -> str:
    return "\n".join(f"- {escaped(deviation)}" for deviation in report.deviation_lines()) or "Nothing."


# --- how to load it -----------------------------------------------------------------------------------------


def _here(facts: ModelFacts) -> str:
    if facts.loader is not None:
        call, comment = 'load_quantized(".", device="cpu")', ""
    else:
        call, comment = f'load_quantized(".", model={facts.name}())', "  # built as it was for training"
    return snippet(QUANTIZER_NAME, f"from {QUANTIZER_NAME} import load_quantized\n\nmodel = {call}{comment}")


def _generate(facts: ModelFacts) -> list[str]:
    """How a language model continues a text, or tokens if the folder has no tokenizer."""
    if facts.pipeline_tag != "text-generation" or facts.loader is None:
        return []
    load = f'from {QUANTIZER_NAME} import load_quantized\n\nmodel = load_quantized(".", device="cpu")\n'
    if facts.has_tokenizer:
        lines = (
            f"from transformers import AutoTokenizer\n\n{load}"
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids\n'
            "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))"
        )
    else:
        lines = (
            f"import torch\n\n{load}"
            "ids = torch.tensor([[1, 2, 3]])  # your text's tokens: there is no tokenizer in this folder\n"
            "print(model.generate(ids, max_new_tokens=40))"
        )
    return [snippet("Generate", lines)]


def _repository(report: QuantizeReport, facts: ModelFacts) -> str:
    """A name for the export on the hub."""
    name = facts.base_model.rpartition("/")[2] if facts.base_model else facts.name
    return f"{name}-GPTQ-{'-'.join(f'{bits}bit' for bits in bit_widths(report)) or 'float'}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
