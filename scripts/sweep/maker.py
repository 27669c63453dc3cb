"""Makes one batch for a model, from its forward's signature and its configuration's sizes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Batch = dict[str, Any]
IMAGES = ("pixel_values", "flattened_patches", "image_patches", "image_pixel_values")
SOUNDS = ("input_features", "input_values", "audio_input_features")


def has(names: set[str], some: tuple[str, ...]) -> bool:
    return any(name in names for name in some)


def names_of(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def look(config: PreTrainedConfig, *names: str) -> Any:
    """The first value under one of these names in the configuration or its parts, outermost first."""
    parts = [config]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
        parts += [v for v in vars(part).values() if isinstance(v, PreTrainedConfig)]
    return None


class Maker:
    """Makes one batch."""

    def __init__(self, model: Any, samples: int, length: int):
        self.model, self.config, self.names = model, model.config, names_of(model)
        self.samples, self.length = samples, length

    def batch(self, media: dict[str, Any], counts: dict[str, int] | None = None) -> Batch:
        inputs: Batch = {}
        if "image" in media:
            inputs |= self._image(media["image"], media.get("extras", False))
        if "audio" in media:
            inputs |= self._audio(media["audio"])
        if "input_ids" in self.names or media.get("inputs") == "ids":
            if counts is None:
                counts = {kind: self._count(kind, inputs) for kind in media if kind in ("image", "audio")}
            text = self._text(counts)
            if "books" in media:
                text = {"input_ids": self.ids(self.samples, self.length, media["books"])}
            inputs = {**text, **inputs} if media.get("inputs") != "ids" else {"inputs": text["input_ids"]}
        if self.config.is_encoder_decoder or "decoder_input_ids" in self.names:
            inputs["decoder_input_ids"] = self._decoder_ids()
        for name, value in self._more(inputs).items():
            if name in self.names and (name not in ("state", "noise", "timestep") or self.needs(name)):
                inputs.setdefault(name, value)
        if "use_cache" in self.names:
            inputs["use_cache"] = False
        return {name: value for name, value in inputs.items() if name in self.names or "kwargs" not in self.names}

    def needs(self, name: str) -> bool:
        parameter = inspect.signature(self.model.forward).parameters[name]
        return parameter.default is inspect.Parameter.empty or self.config.model_type == "pi0"

    def ids(self, *shape: int) -> Tensor:
        return torch.tensor(self._plain_tokens())[torch.randint(0, len(self._plain_tokens()), shape)]

    def _plain_tokens(self) -> list[int]:
        special: set[int] = set()
        parts = [self.config]
        for part in parts:
            for name, value in vars(part).items():
                if isinstance(value, PreTrainedConfig):
                    parts.append(value)
                elif re.search("token|index|_id", name):
                    special |= {
                        v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)
                    }
        vocab = look(self.config.get_text_config(), "vocab_size", "src_vocab_size") or 100
        return [t for t in range(5, min(int(vocab), 200)) if t not in special]

    def _text(self, counts: dict[str, int]) -> Batch:
        ids = self.ids(self.samples, self.length)
        kinds = torch.zeros_like(ids)
        for kind, count in counts.items():
            names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_soft_token_id", f"{kind[:3]}_token_id"]
            token = look(self.config, *names, "im_patch_id", "patch_token_id")
            if token is None or not count:
                continue
            hold = torch.full((self.samples, count), int(token))
            ids = torch.cat([ids[:, :2], hold, ids[:, 2:]], dim=1)
            mark = torch.full_like(hold, 1 if kind == "image" else 3)
            kinds = torch.cat([kinds[:, :2], mark, kinds[:, 2:]], dim=1)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0  # padding
        text = {"input_ids": ids, "attention_mask": mask}
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            if counts and name in self.names:
                text[name] = kinds
        if counts and "token_type_ids" in self.names:
            text["token_type_ids"] = (kinds == 1).long()
        return text

    def _count(self, kind: str, inputs: Batch) -> int:
        """Features per sample, from the model's get_image_features or get_audio_features; 0 if unknown."""
        name = f"get_{kind}_features"
        method = next((getattr(m, name) for m in (self.model, self.model.base_model) if hasattr(m, name)), None)
        if method is None:
            return 0
        taken = set(inspect.signature(method).parameters)
        try:
            with torch.no_grad():
                found = method(**{k: v for k, v in inputs.items() if k in taken})
        except Exception:  # noqa: BLE001 - the forward will say it, too
            return 0
        found = getattr(found, "pooler_output", found)
        rows = sum(t.numel() // t.shape[-1] for t in _tensors(found))
        return rows // self.samples

    def _decoder_ids(self) -> Tensor:
        channels = getattr(getattr(self.config, "decoder_config", None), "num_channels", None)
        return self.ids(self.samples, 16, *([channels] if channels else []))

    # --- images --------------------------------------------------------------------------------------------

    def _image(self, layout: str, extras: bool) -> Batch:
        vision = getattr(self.config, "vision_config", None) or self.config
        size = look(vision, "image_size", "resolution", "input_size", "img_size") or 64
        size = size[0] if isinstance(size, (list, tuple)) else size
        channels = next(
            (c for c in (getattr(vision, n, None) for n in ("num_channels", "in_channels", "in_chans", "channels"))
             if isinstance(c, int) and c in (1, 3, 4)), 3
        )  # fmt: skip
        patch = look(vision, "patch_size", "spatial_patch_size") or 8
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        name = next((n for n in IMAGES if n in self.names), "pixel_values")
        b, grid = self.samples, 4
        frames = look(vision, "temporal_patch_size") or 1
        shapes: dict[str, tuple[int, ...]] = {
            "BCHW": (b, channels, size, size),
            "B1CHW": (b, 1, channels, size, size),
            "B2CHW": (b, 2, channels, size, size),
            "patches": (b * grid * grid, channels * frames * patch * patch),
            "BPD": (b, grid * grid, channels * patch * patch + 2 * (name == "flattened_patches")),
            "B1TCHW": (b, 1, look(vision, "max_num_tiles") or 1, channels, size, size),
            "cameras": (b, 1, channels, size, size),
            "BPC": (b * grid * grid, channels, patch, patch),
        }
        image: Batch = {name: torch.randn(shapes[layout])}
        if name == "flattened_patches" and layout == "BPD":
            image[name][:, :, :2] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) + 1
        if layout in ("patches", "BPC"):
            image["image_grid_thw"] = torch.tensor([[1, grid, grid]] * b)
        elif layout == "cameras":
            image["pixel_attention_mask"] = torch.ones(b, 1, dtype=torch.bool)
        elif layout == "BPD":
            image["spatial_shapes"] = torch.tensor([[grid, grid]] * b)
            image["pixel_attention_mask"] = torch.ones(b, grid * grid, dtype=torch.long)
        if extras:
            image["image_sizes"] = torch.tensor([[size, size]] * b)
            image["image_grid_hw"] = torch.tensor([[grid, grid]] * b)
            image["target_sizes"] = torch.tensor([[grid, grid]] * b)
            image["image_position_ids"] = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).repeat(b, 1, 1)
        return {k: v for k, v in image.items() if k in self.names}

    # --- sounds --------------------------------------------------------------------------------------------

    def _audio(self, layout: str) -> Batch:
        config = next(
            (c for c in (getattr(self.config, n, None) for n in ("audio_config", "encoder_config")) if c), None
        )
        config = config or self.config
        bins = ("num_mel_bins", "n_mel_bins", "input_feat_size", "feature_size", "mel_bins", "input_feat_per_channel")
        mel = look(config, *bins, "feature_projection_input_dim", "input_dim") or 80
        positions = look(config, "max_source_positions")
        time = 2 * positions if positions else 8 * self.length
        name = next((n for n in SOUNDS if n in self.names), "inputs")
        b = self.samples
        shapes: dict[str, tuple[int, ...]] = {
            "BFT": (b, mel, time), "BTF": (b, time, mel), "BS": (b, 4000), "B1S": (b, 1, 4000),
            "BT4F": (b, time, 4 * mel),
        }  # fmt: skip
        audio: Batch = {name: torch.randn(shapes[layout])}
        mask = torch.ones(b, time, dtype=torch.long)
        audio["input_features_mask"] = audio["feature_attention_mask"] = mask
        return {k: v for k, v in audio.items() if k in self.names}

    # --- others --------------------------------------------------------------------------------------------

    def _more(self, inputs: Batch) -> Batch:
        """Rarely needed inputs, by name."""
        ids, b = inputs.get("input_ids"), self.samples
        steps = max(1, look(self.config, "chunk_size") or 8)
        more: Batch = {
            "state": torch.randn(b, look(self.config, "max_state_dim") or 8),
            "noise": torch.randn(b, steps, look(self.config, "max_action_dim") or 8),
            "timestep": torch.rand(b),
        }
        if ids is not None:
            more["bbox"] = torch.tensor([1, 2, 3, 4]).expand(*ids.shape, 4)
        if ids is not None and any(name in inputs for name in IMAGES):
            tiles = look(self.config, "max_num_tiles") or 1
            held = look(self.config, "latent_query_num") or 0
            more |= {
                "qformer_input_ids": self.ids(b, 8),
                "qformer_attention_mask": torch.ones(b, 8, dtype=torch.long),
                "image_embeds_position_mask": (torch.arange(ids.shape[1]) - 2).expand_as(ids).ge(0)
                & (torch.arange(ids.shape[1]) - 2).expand_as(ids).lt(held),
                "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
                "aspect_ratio_ids": torch.ones(b, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(b, 1, tiles, dtype=torch.long),
                "cross_attention_mask": torch.ones(*ids.shape, 1, tiles, dtype=torch.long),
            }
        return more


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.dim() > 1 else []
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part)]
    return []
