"""QuantizeConfig: what to quantize and how, with the field names of AutoGPTQ and GPTQModel.

A frozen dataclass that validates itself, so that a bad option is refused before training. It converts to and from plain
dicts, YAML and ``quantize_config.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from gptq_plugin import __version__
from gptq_plugin.kernels.reference import BITS
from gptq_plugin.options import fields
from gptq_plugin.options.compressed import check_compressed
from gptq_plugin.options.expressions import check_expression
from gptq_plugin.options.gptq_config import translated
from gptq_plugin.options.known_names import naming_the_nearest, unknown_option
from gptq_plugin.options.methods import METHOD_FIELDS, METHODS
from gptq_plugin.options.rules import matching_rules, rule_regex

COMPRESSED = "compressed-tensors"
CHECKPOINT_FORMATS = ("gptq", "gptq_v2", COMPRESSED)
TOKEN_WEIGHTINGS = ("all", "labels", "gradients")
QUANTIZER_NAME = "gptq_plugin"

# Fields that a `dynamic` rule may override for the modules it matches.
MODULE_FIELDS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "static_groups",
    "method",
    *METHOD_FIELDS,
    "damp_auto_increment",
)
# Fields unknown to other tools; quantize_config.json has them under `meta`, which clients ignore.
_META_FIELDS = (
    "method",
    *(name for name in METHOD_FIELDS if name != "damp_percent"),
    "modules_to_not_convert",
    "model_seqlen",
    "nsamples",
    "batch_size",
    "seed",
    "token_weighting",
    "target_bits",
)

_SMALLEST_RATIO, _LARGEST_RATIO, _MOST_ROUNDS = 0.01, 1.25, 100
_KINDS = {
    "bits": fields.one_of(*BITS),
    "group_size": fields.integer(1, also=-1),
    "sym": fields.SWITCH,
    "desc_act": fields.SWITCH,
    "static_groups": fields.SWITCH,
    "method": fields.one_of(*METHODS),
    "damp_percent": fields.share(),
    "damp_auto_increment": fields.share(),
    "clip_ratios": fields.list_of(
        fields.Kind("", lambda ratio: fields.is_number(ratio) and _SMALLEST_RATIO <= ratio <= _LARGEST_RATIO),
        f"a list of 1 to 100 numbers in [{_SMALLEST_RATIO}, {_LARGEST_RATIO}]",
        least=1,
        most=100,
    ),
    "clip_candidates": fields.integer(1, 100),
    "scale_rounds": fields.integer(0, _MOST_ROUNDS),
    "refit_rounds": fields.integer(0, _MOST_ROUNDS),
    "asymmetric_alpha": fields.Kind("a number in [0, 1]", lambda alpha: fields.is_number(alpha) and 0 <= alpha <= 1),
    "true_sequential": fields.SWITCH,
    "lm_head": fields.SWITCH,
    "dynamic": fields.of_type("a mapping from regular expressions to the fields they change", Mapping),
    "modules_to_not_convert": fields.list_of(fields.NAME, "a list of names, such as ['lm_head']"),
    "model_seqlen": fields.integer(1),
    "nsamples": fields.integer(1),
    "batch_size": fields.optional(fields.integer(1), "8, or more on a GPU"),
    "seed": fields.integer(-(2**63), 2**63 - 1),
    "token_weighting": fields.one_of(*TOKEN_WEIGHTINGS),
    "checkpoint_format": fields.one_of(*CHECKPOINT_FORMATS),
    "target_bits": fields.optional(fields.between(2, 16), "`bits` and `group_size` hold"),
}
_EMPTY = ("dynamic", "modules_to_not_convert")  # None is an empty one
_OF_METHOD: Any = None  # the method's value


@naming_the_nearest()
@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize a model.

    Groups and order of columns:

    - ``desc_act=False, static_groups=True``: static act-order (default). Columns are visited in descending order of
      diag(H); groups stay contiguous, so inference costs nothing extra.
    - ``desc_act=True, static_groups=False``: the original act-order. Groups follow the visiting order, inference needs
      ``g_idx``, and some servers (vLLM) refuse it or are slower.
    - ``desc_act=False, static_groups=False``: the original natural order. A group's scale is computed when it is
      reached.
    - ``desc_act=True, static_groups=True``: AutoGPTQ's spelling of static act-order, the same as the first.

    Args:
        bits: Width of a code: 2, 3, 4 or 8.
        group_size: Input channels that share a scale and a zero: a divisor of the layers' in_features, or -1 for one
            group per row.
        sym: Symmetric grid, with the zero fixed at 2^(bits-1); False stores a zero for every group.
        desc_act: Activation order, with groups along that order (see above).
        static_groups: Scales of the original, contiguous groups, fixed before the solve (see above).
        method: ``"gptq"``, or ``"best"``: the most accurate codes, in more time. It is a set of values for
            `damp_percent`, `clip_ratios`, `clip_candidates`, `scale_rounds` and `refit_rounds` (`METHODS`), which those
            of them have that are None when a configuration is made.
        damp_percent: Share of the mean of diag(H) that is added to diag(H), in [0, 1). gptq: 0.01, best: 0.1.
        damp_auto_increment: Added to damp_percent if the Hessian has no Cholesky factor even in float64, ten times as
            much at each further attempt; 0 falls back to round-to-nearest at once.
        clip_ratios: Parts of a group's range that its grid may cover; ``(1.0,)`` is plain GPTQ. gptq: eleven
            from 1 to 0.5, best: thirteen from 1.1 to 0.45.
        clip_candidates: Ratios solved for each row, those with the least expected output error; the best solution is
            kept. 2.
        scale_rounds: Times that scales (and zeros) are picked anew to suit the targets, which earlier errors have moved
            away from the weights, and solved; kept for the rows whose output error falls. gptq: 0, best: 2.
        refit_rounds: Times that the best scales for the codes are computed, then each code once is set to the best for
            all others (coordinate descent); kept for the rows whose output error falls. gptq: 0, best: 3.
        asymmetric_alpha: Share, in [0, 1], of the correction with which layers make up for what the quantized layers
            before them did to their inputs: W + α·W·C·(H + Λ)⁻¹ is rounded, C the mean of (x − x̂) x̂ᵀ. Above 0 every
            batch also runs through the float model. gptq: 0, best: 0.5.
        true_sequential: Calibrate each layer on the outputs of the quantized layers before it. Lock-step calibration
            does so in one pass; False only occurs in other tools' files.
        lm_head: Also quantize the output embedding, or the output layer of a classifier.
        dynamic: GPTQModel's per-module rules, tried in order; the first match wins (``re.match`` on the full name):
            ``{"regex": {"bits": 8}}`` overrides fields, ``{"-:regex": {}}`` leaves modules float.
        modules_to_not_convert: Modules to leave float: a full dotted name, or consecutive components of one
            (``"mlp.down_proj"`` is every module whose name contains these).
        model_seqlen: Tokens per calibration sample made from text; longer token lists are cut to it.
        nsamples: Number of calibration samples over all ranks.
        batch_size: Calibration samples of one length per forward. None: 8; on one GPU alone more, up to 2^17 tokens,
            as its memory allows.
        seed: Seed for choosing calibration samples.
        token_weighting: Positions of a calibration batch that count: ``"all"`` except padding, or ``"labels"``, those
            that enter the loss (label not -100). A causal model's loss compares position i with label i + 1.
            ``"gradients"`` weights each, for each layer, by its mean (∂loss/∂output)²: a backward of every batch.
        checkpoint_format: ``"gptq"`` (v1, stores zeros minus one), ``"gptq_v2"`` or ``"compressed-tensors"`` (its
            pack-quantized, which vLLM also loads with asymmetric grids).
        target_bits: Bits per weight of all quantized layers together, with scales and zeros as stored. Widths, and
            groups of `group_size` and smaller ones, are chosen for each layer so that the model's outputs stay nearest
            to the float model's. Layers whose `dynamic` rule has bits or group_size keep theirs, and count. None:
            `bits`, which only tells else which layers can be packed, and `group_size` hold for all.

    Raises:
        ValueError: A field has an invalid value; the message names the field and the choices.
        TypeError: There is no such field; the message names the most similar one.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = True
    damp_percent: float = _OF_METHOD
    damp_auto_increment: float = 0.0025
    clip_ratios: tuple[float, ...] = _OF_METHOD
    true_sequential: bool = True
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    model_seqlen: int = 2048
    nsamples: int = 128
    batch_size: int | None = None
    seed: int = 0
    token_weighting: str = "all"
    checkpoint_format: str = "gptq"
    method: str = "gptq"
    target_bits: float | None = None
    clip_candidates: int = _OF_METHOD
    scale_rounds: int = _OF_METHOD
    refit_rounds: int = _OF_METHOD
    asymmetric_alpha: float = _OF_METHOD

    def __post_init__(self) -> None:
        _KINDS["method"].check("method", self.method)
        for name, value in METHODS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, kind in _KINDS.items():
            given = getattr(self, name)
            if name not in _EMPTY or given is not None:  # YAML and JSON have None for empty collections
                kind.check(name, given)
        object.__setattr__(self, "modules_to_not_convert", tuple(self.modules_to_not_convert or ()))
        object.__setattr__(self, "clip_ratios", tuple(self.clip_ratios))
        for pattern, overrides in (self.dynamic or {}).items():
            _check_rule(self, pattern, overrides)
        object.__setattr__(self, "dynamic", {k: dict(v or {}) for k, v in (self.dynamic or {}).items()})
        if self.checkpoint_format == COMPRESSED:
            check_compressed(self)

    @property
    def collected_batch_size(self) -> int:
        """Samples that go into a batch while data is collected: 8 where `batch_size` leaves that open."""
        return self.batch_size or 8

    def for_module(self, name: str) -> QuantizeConfig | None:
        """The configuration of one module after the `dynamic` rules; None if a rule leaves it float."""
        pattern, overrides = self.rule_for(name)
        if pattern.startswith("-:"):
            return None
        return _overridden(self, overrides) if self.dynamic else self

    def rule_for(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """The `dynamic` rule of a module, the first whose pattern matches; ("", {}) if none does."""
        pattern = next(iter(matching_rules(self.dynamic, name)), "")
        return pattern, self.dynamic[pattern] if pattern else {}

    @property
    def keeps_ratios(self) -> bool:
        """True if every scale comes from its group's range in the float weight and one of `clip_ratios`."""
        return self.static_groups and not (self.scale_rounds or self.refit_rounds or self.asymmetric_alpha)

    def group_size_for(self, in_features: int) -> int:
        """Group size of a layer with `in_features` inputs: `group_size` if it divides them; else the largest of 128, 64
        and 32, the sizes of clients' kernels, that is smaller and does; else -1."""
        if self.group_size == -1 or in_features % self.group_size == 0:
            return self.group_size
        smaller = (size for size in (128, 64, 32) if size < self.group_size and in_features % size == 0)
        return next(smaller, -1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for YAML or JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["dynamic"] = {k: dict(v) for k, v in self.dynamic.items()}
        values["clip_ratios"] = list(self.clip_ratios)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizeConfig:
        """The inverse of `to_dict`. Also takes what transformers' GPTQConfig holds; see `options.gptq_config`.

        Raises:
            ValueError: An unknown option; the message names it and the most similar one.
        """
        fields.MAPPING.check("a configuration", values)
        values = translated(values, [field.name for field in dataclasses.fields(cls)])
        if unknown := unknown_option(cls, values):
            raise ValueError(unknown)
        return cls(**values)

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> QuantizeConfig:
        """The inverse of `to_yaml`.

        Raises:
            ValueError: It is no YAML, or as `from_dict`.
        """
        fields.TEXT.check("text", text)
        try:
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"a configuration must be YAML: {str(error)[:600]}") from error
        return cls.from_dict({} if values is None else values)

    def to_quantize_config(self) -> dict[str, Any]:
        """The content of ``quantize_config.json``, AutoGPTQ's file, which GPTQModel, vLLM and others read.

        ``format`` repeats ``checkpoint_format``: loaders read either.
        """
        values = self.to_dict()
        meta = {name: values.pop(name) for name in _META_FIELDS}
        if not self.damp_percent:  # GPTQModel and AutoGPTQ refuse 0
            meta["damp_percent"] = values.pop("damp_percent")
        return {
            "quant_method": "gptq",
            **values,
            "format": self.checkpoint_format,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"{QUANTIZER_NAME}:{__version__}"], QUANTIZER_NAME: meta},
        }

    @classmethod
    def from_quantize_config(cls, values: Mapping[str, Any]) -> QuantizeConfig:
        """Reads ``quantize_config.json`` or a ``quantization_config``, ours, GPTQModel's or AutoGPTQ's.

        Fields unknown to this class belong to other tools and are left out; absent ones have those tools' defaults (v1
        format, no act-order, symmetric grid).

        Raises:
            ValueError: `bits` is missing, or a field has an invalid value.
        """
        fields.MAPPING.check("a GPTQ configuration", values)
        if "bits" not in values:
            raise ValueError("a GPTQ configuration needs `bits`; this one has " + ", ".join(sorted(map(str, values))))
        known = {f.name for f in dataclasses.fields(cls)}
        found = {k: v for k, v in {**values, **our_meta(values)}.items() if k in known and v is not None}
        found.setdefault("checkpoint_format", values.get("format") or "gptq")
        found.setdefault("static_groups", False)
        return cls(**found)


def own_config(values: Mapping[str, Any]) -> QuantizeConfig | None:
    """The configuration with which this package quantized, from ``quantize_config.json``; None if it did not, or the
    file does not hold it."""
    if "clip_ratios" not in our_meta(values):
        return None  # a converted checkpoint of another tool has only our list of files there
    try:
        return QuantizeConfig.from_quantize_config(values)
    except (ValueError, TypeError):
        return None


def our_meta(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our part of a description's ``meta``; empty where it has none."""
    meta = values.get("meta")
    ours = meta.get(QUANTIZER_NAME) if isinstance(meta, Mapping) else None
    return ours if isinstance(ours, Mapping) else {}


def _overridden(config: QuantizeConfig, overrides: Mapping[str, Any]) -> QuantizeConfig:
    """The configuration under a rule. A rule that sets the method sets its fields too, but for those that it gives."""
    of_method = dict.fromkeys(METHOD_FIELDS) if "method" in overrides else {}
    return dataclasses.replace(config, **{**of_method, **overrides}, dynamic={})


def _check_rule(config: QuantizeConfig, pattern: Any, overrides: Any) -> None:
    fields.NAME.check("each key of dynamic", pattern)
    rule = f"dynamic[{fields.shown(pattern)}]"
    try:
        check_expression(rule_regex(pattern))
    except ValueError as error:
        raise ValueError(f"dynamic: {error}") from error
    fields.optional(fields.MAPPING, "no overrides").check(rule, overrides)
    overrides = overrides or {}
    if pattern.startswith("-:"):
        if overrides:
            raise ValueError(f"{rule} leaves modules float, so it takes no overrides; got {fields.shown(overrides)}")
        return
    if not overrides or any(name not in MODULE_FIELDS for name in overrides):
        raise ValueError(
            f"{rule} must override some of {', '.join(MODULE_FIELDS)}; got {fields.shown(dict(overrides))}. "
            f"To leave modules float, write '-:{rule_regex(pattern)}': {{}}"
        )
    try:
        _overridden(config, overrides)
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from error
