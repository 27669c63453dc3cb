"""What `AutoGPTQForCausalLM` gives: a transformers model with AutoGPTQ's methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from gptq_plugin.autogptq.base_config import BaseQuantizeConfig
from gptq_plugin.autogptq.folders import tokenizer_kept
from gptq_plugin.autogptq.options import IGNORED_SAVING, KERNELS, REFUSED_SAVING, sort_out
from gptq_plugin.autogptq.samples import computing_device, longest, token_samples
from gptq_plugin.config import QuantizeConfig
from gptq_plugin.quantize.module import QuantizeModule
from gptq_plugin.report.report import QuantizeReport


class BaseGPTQForCausalLM(nn.Module):
    """A transformers model with AutoGPTQ's methods; everything else is the model's.

    Attributes:
        model: The transformers model, its layers replaced by QuantLinear once it is quantized.
        quantize_config: As given, or as the checkpoint tells.
        quantized: True once its layers are.
    """

    model: Any

    def __init__(self, model: nn.Module, quantize_config: BaseQuantizeConfig, quantized: bool = False) -> None:
        super().__init__()
        self.model = model
        self.quantize_config = quantize_config
        self.quantized = quantized
        self._export: Callable[..., Path] | None = None  # called as export(model, folder), once it is quantized here

    @property
    def hf_device_map(self) -> Any:
        """transformers' map of modules to devices; None without one."""
        return getattr(self.model, "hf_device_map", None)

    def quantize(
        self,
        examples: Iterable[Any],
        batch_size: int | None = None,
        *,
        cache_examples_on_gpu: bool = True,
        tokenizer: Any = None,
        **options: Any,
    ) -> QuantizeReport:
        """Quantizes the model in place, on the GPU if there is one; all examples are used, uncut.

        Args:
            examples: Dicts with ``input_ids`` and ``attention_mask``, as a tokenizer returns them. Positions that the
                mask hides do not count.
            batch_size: Examples of one length in a forward; `QuantizeConfig`'s when None (AutoGPTQ: 1). Changes no
                result beyond rounding.
            cache_examples_on_gpu: False keeps the activations of waiting examples on the CPU; True keeps as many on
                the GPU as fit.
            tokenizer: Not in AutoGPTQ: for examples that are texts; saved with the model.
            options: Those of AutoGPTQ that choose its kernels are ignored with a warning.

        Raises:
            RuntimeError: The model is quantized already.
            ValueError: An option is unknown.
            CalibrationError, TargetError: See `QuantizeModule.quantize`.
        """
        sort_out(BaseGPTQForCausalLM.quantize, options, ignored=KERNELS)
        if self.quantized:
            raise RuntimeError(
                "the model is quantized already: load the float one with AutoGPTQForCausalLM.from_pretrained"
            )
        samples = token_samples(examples)
        default = QuantizeConfig()
        quantizer = QuantizeModule(
            self.quantize_config.forwarded(
                nsamples=max(len(samples), default.nsamples),
                model_seqlen=max(longest(samples), default.model_seqlen),
                batch_size=default.batch_size if batch_size is None else batch_size,
            ),
            offload_activations=None if cache_examples_on_gpu else True,
        )
        report = quantizer.quantize(self.model, samples, tokenizer=tokenizer, device=computing_device(self.model))
        self._export = partial(quantizer.export, tokenizer=tokenizer, overwrite=True)
        self.quantized = True
        return report

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Path:
        """Exports the quantized model; see `QuantizeModule.export`. An earlier export is replaced, and tokenizer files
        in the folder stay.

        Args:
            save_dir: The folder: new, empty, or an earlier export.
            use_safetensors: Only True.
            safetensors_metadata: Ignored with a warning.

        Raises:
            RuntimeError: The model is not quantized, or was loaded so: its folder holds it.
            ValueError: An option is unknown, or would write pickled weights.
            ExportError: See `QuantizeModule.export`.
        """
        given = {"use_safetensors": use_safetensors, **options}
        if safetensors_metadata is not None:
            given["safetensors_metadata"] = safetensors_metadata
        sort_out(BaseGPTQForCausalLM.save_quantized, given, ignored=IGNORED_SAVING, refused=REFUSED_SAVING)
        if self._export is None:
            raise RuntimeError(
                f"the model was loaded quantized: copy {self.quantize_config.model_name_or_path}, which holds it, or "
                "rewrite it with `gptq-plugin convert`"
                if self.quantized
                else "the model is not quantized yet: call quantize(examples) first"
            )
        name = self.quantize_config.model_file_base_name
        if name not in (None, "model"):
            warnings.warn(
                f"model_file_base_name={name!r} is ignored: weights are written to model.safetensors, the name that "
                "every loader looks for",
                stacklevel=2,
            )
        with tokenizer_kept(save_dir):
            folder = self._export(self.model, save_dir)
        self.quantize_config.model_name_or_path = str(save_dir)
        self.quantize_config.model_file_base_name = "model"
        return folder

    save_pretrained = save_quantized

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        *,
        use_auth_token: str | bool | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a quantized model",
        **options: Any,
    ) -> Any:
        """Uploads the folder that `save_quantized` wrote last; with `save_dir`, calls that first.

        Args:
            repo_id: ``owner/name``; made if it is not there.
            save_dir: As for `save_quantized`, with its options.
            use_auth_token: `token`, by its old name.
            token: As for `huggingface_hub.HfApi`, like the following.
            private: Make the repository private.
            create_pr: Open a pull request instead of a commit.
            commit_message: Of the commit.
            options: Those of `save_quantized`.

        Raises:
            RuntimeError: Nothing was saved yet.
        """
        if save_dir is not None:
            self.save_quantized(save_dir, **options)
        else:
            sort_out(BaseGPTQForCausalLM.push_to_hub, options, ignored=IGNORED_SAVING, refused=REFUSED_SAVING)
        folder = self.quantize_config.model_name_or_path
        if folder is None or not Path(folder).is_dir():
            raise RuntimeError("the model is in no folder yet: give push_to_hub(repo_id, save_dir=FOLDER)")
        hub = huggingface_hub.HfApi(token=use_auth_token if token is None else token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return hub.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
