"""Lists transformers' model types, and builds a tiny model of any of them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformers
from overrides import BY_MAPPING
from tiny import config_class, tiny
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
}
LARGEST = 20_000_000  # parameters of a tiny model


def rows() -> list[tuple[str, str]]:
    """All pairs (mapping, type)."""
    return [(mapping, kind) for mapping, name in MAPPINGS.items() for kind in getattr(modeling_auto, name)]


def build(mapping: str, kind: str) -> Any:
    """Builds the mapping's (first) class of that type, tiny, with no constant weight, and the same every time.

    Experts run in their module's own loop: transformers' kernels for all at once round differently.
    """
    names = getattr(modeling_auto, MAPPINGS[mapping])[kind]
    architecture = getattr(transformers, names if isinstance(names, str) else names[0])
    more = {"num_labels": 32} if mapping == "image-classification" else BY_MAPPING.get((mapping, kind), {})
    count = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # some cannot be built there
        count = _parameters(architecture(_part(tiny(config_class(kind), **more), architecture.config_class)))
    if count <= LARGEST:
        torch.manual_seed(0)
        model = architecture(_part(tiny(config_class(kind), **more), architecture.config_class)).eval()
        count = _parameters(model)
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters, not tiny")
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all() or (p.numel() > 1 and p.min() == p.max()):
                p.copy_((torch.nan_to_num(p, 0, 0, 0) + 0.02 * torch.randn_like(p)).to(p.dtype))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    return model.float()


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _part(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The configuration, or the part of it that the class takes."""
    parts = [config]
    for part in parts:
        if type(part) is kind:
            return part
        parts += [v for v in vars(part).values() if isinstance(v, PreTrainedConfig)]
    return config
