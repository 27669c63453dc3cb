"""The sequences of a module's call: which arguments hold them, and which of their positions a mask keeps.

Nothing here knows a model. A mask is an argument named so; transformers' documentation has 1 for positions to keep,
torch.nn's True for positions to ignore, and what another module means is observed (`observation`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_plugin.calibration.batches import leaves
from gptq_plugin.calibration.layouts import within
from gptq_plugin.calibration.mask_values import kept_positions
from gptq_plugin.model.hf_models import is_encoder_decoder, is_transformers

IGNORED_LABEL = -100
TARGETS = "decoder"  # the name of an encoder-decoder's second sequence
_MASK = re.compile(r"_?(key)?_?(padding|pad|attention|attn|input)?_?masks?$")
_LENGTHS = re.compile(r"_?(lengths?|lens?|seqlens?)$")
_OTHER = re.compile(r"head|loss|image|pixel|visual|token_?mask|bool_masked|time_|feature_mask|causal|inv")
_BY_ANOTHER_NAME = {"memory": ("memory", "src", "encoder"), "x": ("",), "input": ("",)}


@dataclass(frozen=True)
class Sequence:
    """The positions that a mask, lengths or labels describe.

    Attributes:
        kept: bool [samples, positions], False for padding.
        contents: The arguments that hold what stands at the positions.
        is_documented: The sense of the mask's ones is documented; else it is that of its name.
        is_labels: The content are labels, of which the model makes a decoder's ids.
    """

    kept: Tensor
    contents: tuple[Tensor, ...]
    is_documented: bool = True
    is_labels: bool = False


def arguments_of(parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a call's arguments by name, at any depth."""
    return {name: value for name, value in leaves(parameters) if isinstance(value, Tensor)}


def masks_among(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks and lengths among arguments."""
    return {name: value for name, value in arguments.items() if _is_mask(name, value) or _is_lengths(name, value)}


def sequences_in(
    module: nn.Module, arguments: Mapping[str, Tensor], inverted: Collection[str] = ()
) -> dict[str, Sequence]:
    """The sequences of a call by the name of their mask, in the order of their arguments; an encoder-decoder's targets
    come last.

    Args:
        module: The module that is called.
        arguments: Its arguments, see `arguments_of`.
        inverted: Names of masks whose ones mean the opposite of what documentation or name tell.
    """
    has_targets = writes_targets(module)
    masks = masks_among(arguments)
    contents = {n: v for n, v in arguments.items() if n not in masks and n != "labels" and v.dim() and v.numel()}
    found: dict[str, Sequence] = {}
    for name, mask in masks.items():
        if has_targets and name.startswith("decoder_"):
            continue
        mine = _contents(name, masks, contents, has_targets)
        documented, hides = _documented(module, name, mask)
        kept = _kept(module, name, mask, hides != (name in inverted), mine)
        if kept is None:
            continue
        held = tuple(value for value in mine.values() if within(kept, value) is not None)
        if held:
            found[name] = Sequence(kept, held, documented)
    if has_targets:
        sources = contents.get("input_ids")
        if not found and sources is not None:
            found["input_ids"] = Sequence(torch.ones_like(sources, dtype=torch.bool), (sources,))
        targets = _targets(arguments)
        found.update({TARGETS: targets} if targets is not None else {})
    return found


def writes_targets(module: nn.Module) -> bool:
    """True for a transformers model that is called with the sequence to write beside the one to read."""
    return is_encoder_decoder(module) and "decoder_input_ids" in inspect.signature(module.forward).parameters


def in_the_loss(labels: Tensor) -> Tensor:
    """The positions whose label the loss looks at, bool [samples, positions]."""
    return labels != IGNORED_LABEL


def _targets(arguments: Mapping[str, Tensor]) -> Sequence | None:
    """A decoder's sequence. Behind the last label nothing of it matters: a decoder looks back only."""
    held = [
        value
        for name, value in arguments.items()
        if name in ("decoder_input_ids", "decoder_inputs_embeds") and value.dim() > 1
    ]
    labels, mask = arguments.get("labels"), arguments.get("decoder_attention_mask")
    if labels is not None and (labels.dim() != 2 or labels.is_floating_point()):
        labels = None
    if not held and labels is None:
        return None
    sizes = tuple(held[0].shape[:2]) if held else tuple(labels.shape)  # type: ignore[union-attr]
    kept = kept_positions(mask, False, sizes[0]) if mask is not None else None
    if kept is None and labels is not None and tuple(labels.shape) == sizes:
        kept = in_the_loss(labels).flip(1).int().cummax(1).values.flip(1).bool()
    if kept is None:
        kept = torch.ones(sizes, dtype=torch.bool, device="cpu")
    return Sequence(kept, tuple(held) or (labels,), is_labels=not held)  # type: ignore[arg-type]


def _is_mask(name: str, value: Tensor) -> bool:
    return value.dim() > 0 and value.numel() > 0 and bool(_MASK.search(name)) and not _OTHER.search(name)


def _is_lengths(name: str, value: Tensor) -> bool:
    return value.dim() == 1 and not value.is_floating_point() and bool(_LENGTHS.search(name)) and "cu_" not in name


def _contents(
    mask: str, masks: Mapping[str, Tensor], contents: Mapping[str, Tensor], has_targets: bool
) -> dict[str, Tensor]:
    """The arguments that a mask is of: by its prefix (`src_mask`, `src`), or those without another mask's."""
    stems = {name: _LENGTHS.sub("", _MASK.sub("", name)) for name in masks}
    own = stems[mask]
    if own:
        for stem in _BY_ANOTHER_NAME.get(own, (own,)):
            mine = {name: value for name, value in contents.items() if stem and name.startswith(stem)}
            if mine:
                return mine
    others = tuple({stem for stem in stems.values() if stem and stem != own} | ({"decoder_"} if has_targets else set()))
    return {name: value for name, value in contents.items() if not others or not name.startswith(others)}


def _documented(module: nn.Module, name: str, mask: Tensor) -> tuple[bool, bool]:
    """Whether the sense of a mask's ones is documented, and whether they hide."""
    if _is_lengths(name, mask) or (mask.is_floating_point() and bool((mask < 0).any())):
        return True, False
    if _is_of_torch(module, name):
        return True, True
    return is_transformers(module), "pad" in name and not is_transformers(module)


def _kept(module: nn.Module, name: str, mask: Tensor, hides: bool, contents: Mapping[str, Tensor]) -> Tensor | None:
    if _is_lengths(name, mask):
        longest = max((v.shape[1] for v in contents.values() if v.dim() > 1 and v.shape[0] == len(mask)), default=0)
        return torch.arange(longest, device=mask.device) < mask[:, None] if longest else None
    of_pairs = _is_of_torch(module, name) and not name.endswith("key_padding_mask")
    if mask.dim() == 1:
        return kept_positions(mask[None], hides)
    if mask.dim() == 2 and not of_pairs and any(within(mask, value) is not None for value in contents.values()):
        return kept_positions(mask, hides)
    queries, keys = (mask.shape[-2], mask.shape[-1]) if mask.dim() > 1 else (1, mask.shape[-1])
    for value in contents.values():
        sizes = value.shape[:2]
        if len(sizes) == 2 and keys in sizes:
            samples = sizes[0] if sizes[1] == keys else sizes[1]
            if mask.dim() == 2 and samples != mask.shape[0] and queries != keys:
                continue
            return kept_positions(mask[None] if of_pairs and mask.dim() == 2 else mask, hides, samples)
    return kept_positions(mask, hides) if mask.dim() == 2 and mask.shape[0] == 1 else None


def _is_of_torch(module: nn.Module, name: str) -> bool:
    """True for an argument of one of PyTorch's own modules, whose masks are True for what is ignored."""
    return type(module).__module__.startswith("torch.nn.") and name in inspect.signature(module.forward).parameters
