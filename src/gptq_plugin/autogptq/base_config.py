"""AutoGPTQ's `BaseQuantizeConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptq_plugin.autogptq.options import HUB, IGNORED_BY_HUB, sort_out
from gptq_plugin.checkpoint.files import CONFIG, QUANTIZE_CONFIG, write_json
from gptq_plugin.checkpoint.hub import local_folder
from gptq_plugin.checkpoint.schema import check_description, check_model_config, read_checked
from gptq_plugin.config import QuantizeConfig, own_config
from gptq_plugin.errors import CheckpointError, brief
from gptq_plugin.options.fields import shown

_FIELDS = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential")


@dataclass(init=False)
class BaseQuantizeConfig:
    """How to quantize, for `AutoGPTQForCausalLM`; `QuantizeConfig` has the same fields and more.

    Defaults are AutoGPTQ's (``group_size=-1``, ``damp_percent=0.01``, ``desc_act=True``), except for
    ``static_groups=True``, which is `QuantizeConfig`'s: columns are visited in order of activation and groups stay
    contiguous. The result is more accurate, costs nothing at run time, and every server loads it. AutoGPTQ's default
    is ``static_groups=False``.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Input channels that share a scale; -1 is one group a row.
        damp_percent: Share of the mean of diag(H) added to it, in [0, 1).
        desc_act: Visit columns in order of activation.
        static_groups: Fix scales before the solve; see above.
        sym: Symmetric grid.
        true_sequential: Only True: lock-step calibration gives it in one pass.
        quant_method: Only ``"gptq"``.
        checkpoint_format: ``"gptq"``, as AutoGPTQ, or another of `QuantizeConfig`.
        model_name_or_path: Set by `save_quantized` and `from_quantized`.
        model_file_base_name: The same; weights are always written to model.safetensors.

    Raises:
        ValueError: An option is unknown or has a value that cannot work.
    """

    bits: int
    group_size: int
    damp_percent: float
    desc_act: bool
    static_groups: bool
    sym: bool
    true_sequential: bool
    model_name_or_path: str | None
    model_file_base_name: str | None
    quant_method: str
    checkpoint_format: str

    def __init__(
        self,
        bits: int = 4,
        group_size: int = -1,
        damp_percent: float = 0.01,
        desc_act: bool = True,
        *,
        static_groups: bool = True,
        sym: bool = True,
        true_sequential: bool = True,
        quant_method: str = "gptq",
        checkpoint_format: str = "gptq",
        model_name_or_path: str | None = None,
        model_file_base_name: str | None = None,
        **options: Any,
    ) -> None:
        marlin = "export 'gptq', which vLLM and GPTQModel repack for Marlin when they load it"
        sort_out(
            BaseQuantizeConfig.__init__, options, ignored={}, refused={"is_marlin_format": ((False, None), marlin)}
        )
        if checkpoint_format == "marlin":
            raise ValueError(f"BaseQuantizeConfig does not take checkpoint_format='marlin': {marlin}")
        if quant_method != "gptq":
            raise ValueError(f"BaseQuantizeConfig does not take quant_method={shown(quant_method)}: only 'gptq'")
        self.bits = bits
        self.group_size = group_size
        self.damp_percent = damp_percent
        self.desc_act = desc_act
        self.static_groups = static_groups
        self.sym = sym
        self.true_sequential = true_sequential
        self.model_name_or_path = model_name_or_path
        self.model_file_base_name = model_file_base_name
        self.quant_method = quant_method
        self.checkpoint_format = checkpoint_format
        self.forwarded()

    def forwarded(self, **others: Any) -> QuantizeConfig:
        """The same as a `QuantizeConfig`; `others` are fields of that alone."""
        fields = {name: getattr(self, name) for name in (*_FIELDS, "checkpoint_format")}
        return QuantizeConfig.from_dict({**fields, **others})

    @classmethod
    def from_quantize_config(cls, config: QuantizeConfig) -> BaseQuantizeConfig:
        """What it can hold of a `QuantizeConfig`."""
        fields: dict[str, Any] = {name: getattr(config, name) for name in (*_FIELDS, "checkpoint_format")}
        return cls(**fields)

    @classmethod
    def from_pretrained(
        cls, save_dir: str | Path, *, use_auth_token: str | bool | None = None, **options: Any
    ) -> BaseQuantizeConfig:
        """Reads quantize_config.json of a folder or of a checkpoint on the hub; else config.json.

        Args:
            save_dir: A folder, or ``owner/name``.
            use_auth_token: `token`, by its old name.
            options: revision, token, cache_dir, force_download, local_files_only, subfolder.

        Raises:
            CheckpointError: Neither file is there, or it describes no GPTQ checkpoint.
        """
        hub = sort_out(cls.from_pretrained, options, ignored=IGNORED_BY_HUB, forwarded=HUB)
        folder = local_folder(save_dir, **{"token": use_auth_token, **hub})
        beside = read_checked(folder / QUANTIZE_CONFIG, check_description)
        model_config = read_checked(folder / CONFIG, check_model_config) if beside is None else None
        file = folder / (CONFIG if beside is None else QUANTIZE_CONFIG)
        values = beside or (model_config or {}).get("quantization_config")
        if values is None:
            raise CheckpointError(f"{folder} has neither {QUANTIZE_CONFIG} nor a quantization_config in {CONFIG}")
        check_description(values, file)
        try:
            found = cls.from_quantize_config(QuantizeConfig.from_quantize_config(values))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} describes no GPTQ checkpoint: {brief(error)}") from error
        found.model_name_or_path = str(save_dir)
        found.model_file_base_name = values.get("model_file_base_name")
        return found

    def save_pretrained(self, save_dir: str | Path) -> None:
        """Writes quantize_config.json, unless an export's is there, which tells the same and more.

        Raises:
            CheckpointError: There is one that cannot be read.
        """
        file = Path(save_dir) / QUANTIZE_CONFIG
        if own_config(read_checked(file, check_description) or {}) is None:
            write_json(file, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)
