"""What runs while something fails: quantizations and trainings in this process, and what must be as before."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import transformers
from campaigns.campaign import Wrong
from campaigns.trainings import QUANTIZER, Tuned, digests, llama, samples
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from gptq_plugin import Finish, GPTQCallback, GPTQTrainerCallback, QuantizeModule, load_quantized
from gptq_plugin.export.convert import convert
from gptq_plugin.layers.qlinear import QuantLinear


class Model:
    """A model with hooks of a user's, and everything that has to be the same after a failure."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        layers[0].register_forward_hook(lambda module, inputs, output: output * 1.0)
        layers[-2].register_forward_pre_hook(lambda module, inputs: None)
        next(model.parameters()).requires_grad_(False)
        self.remember()

    def remember(self) -> None:
        """Takes what is there now for right."""
        self.tensors = self._tensors()
        self.values = [tensor.detach().clone() for tensor in self.tensors.values()]
        self.state = self._state()

    def check_is_back(self) -> None:
        """Raises `Wrong` unless all is as it was."""
        tensors = self._tensors()
        if list(tensors) != list(self.tensors):
            raise Wrong(f"other tensors: {sorted(tensors.keys() ^ self.tensors.keys())[:5]}")
        for (name, tensor), value in zip(tensors.items(), self.values, strict=True):
            if tensor is not self.tensors[name]:
                raise Wrong(f"{name} is another tensor")
            if not torch.equal(tensor.detach().view(torch.uint8), value.view(torch.uint8)):
                raise Wrong(f"{name} has other values")
        for what, own in self._state().items():
            if own != self.state[what]:
                raise Wrong(f"{what} differ")

    def check_is_quantized(self) -> None:
        """Raises `Wrong` if nothing is."""
        if not any(isinstance(module, QuantLinear) for module in self.model.modules()):
            raise Wrong("nothing was raised, and nothing is quantized")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _state(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules())
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "hooks": {n: [list(m._forward_hooks), list(m._forward_pre_hooks)] for n, m in modules.items()},
            "forwards": {n: "forward" in vars(m) for n, m in modules.items()},
            "training flags": {n: m.training for n, m in modules.items()},
            "grad flags": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "configurations": [m.config.to_dict() for m in modules.values() if hasattr(m, "config")],
        }


class Scene:
    """Something that is run once, in a folder of its own, where an earlier export lies.

    Args:
        folder: Gets "export", "checkpoints".
        earlier: An export to begin with; None for none.
    """

    keeps_export: ClassVar[bool] = False  # once it is in place, whatever fails afterwards

    def __init__(self, folder: Path, earlier: Path | None) -> None:
        self.folder = folder
        self.before = digests(earlier) if earlier is not None else {}
        self.model = Model(self.build())
        self.saved: dict[str, str] = {}
        self.threads = set(threading.enumerate())

    def build(self) -> nn.Module:
        return llama().train()

    def run(self) -> None:
        """Runs it to its end."""
        raise NotImplementedError

    def check_is_back(self) -> None:
        """Raises `Wrong` unless it is as if nothing had been run."""
        self.model.check_is_back()
        export = self.folder / "export"
        if (digests(export) if export.exists() else {}) != self.before:
            if not self.keeps_export:
                raise Wrong("the export has changed, or half a one is there")
            load_quantized(export)
        if self.saved and any(digests(self.folder / "checkpoints").get(n) != d for n, d in self.saved.items()):
            raise Wrong("a checkpoint has changed")
        self.check_clean()

    def check_done(self) -> None:
        """Raises `Wrong` unless it has come to a right end."""
        self.model.check_is_quantized()
        load_quantized(self.folder / "export")
        self.check_clean()

    def check_clean(self) -> None:
        """Raises `Wrong` if folders or threads are left."""
        places = [self.folder, self.folder / "export"]
        hidden = [one.name for place in places if place.exists() for one in place.iterdir() if one.name[0] == "."]
        if hidden and not is_read_only(self.folder):
            raise Wrong(f"hidden folders are left: {hidden}")
        threads = [one for one in set(threading.enumerate()) - self.threads if one.is_alive()]
        for thread in threads:
            thread.join(5)
        if any(thread.is_alive() for thread in threads):
            raise Wrong(f"threads are left: {threads}")
        if (
            not torch.is_grad_enabled()
            or torch.get_default_dtype() != torch.float32
            or torch.is_inference_mode_enabled()
        ):
            raise Wrong("PyTorch's modes have changed")


def is_read_only(folder: Path) -> bool:
    """True if its file system is."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _rows() -> list[torch.Tensor]:
    return [one["input_ids"] for one in samples()[:16]]


class Module(Scene):
    """`QuantizeModule.quantize` of a Llama, exported meanwhile."""

    options: ClassVar[dict[str, Any]] = {}

    def run(self) -> None:
        quantizer = QuantizeModule(**{**QUANTIZER, **self.options})
        quantizer.quantize(self.model.model, _rows(), export_dir=self.folder / "export", overwrite=True)


class Streamed(Module):
    """The same with weights and activations that come and go."""

    options: ClassVar[dict[str, Any]] = {"offload_weights": True, "offload_activations": True}


class Experts(Module):
    """The same of experts in one tensor."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "num_experts": 2,
                 "num_experts_per_tok": 1}  # fmt: skip
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).train()


class Best(Scene):
    """The best method, bits chosen for each layer, and values that are kept in files for the next run."""

    def run(self) -> None:
        options = {**QUANTIZER, "method": "best", "target_bits": 3.9, "cache_dir": self.folder / "cache"}
        quantizer = QuantizeModule(**options)
        quantizer.quantize(self.model.model, _rows(), export_dir=self.folder / "export", overwrite=True)

    def check_clean(self) -> None:
        super().check_clean()
        left = list((self.folder / "cache").glob(".*"))
        if left and not is_read_only(self.folder):
            raise Wrong(f"half a file is left: {left}")


class Finished(Scene):
    """A quantized model that is trained towards its float model, and exported before it is left as it is."""

    keeps_export = True

    def run(self) -> None:
        quantizer, model = QuantizeModule(**QUANTIZER), self.model.model
        with quantizer.temporarily(model, _rows(), keep=True):
            options = Finish("scales", steps=4, nsamples=12, held_out=4, judgements=2, tokens_per_step=64)
            quantizer.finish(model, None, _rows(), options)
            quantizer.export(model, self.folder / "export", overwrite=True)


class Lightning(Scene):
    """A `Trainer.fit` with a quality gate that asks for more bits, and a checkpoint."""

    swap: bool | None = None
    keeps_export = True

    def build(self) -> nn.Module:
        class Gated(Tuned):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", self.training_step(batch, batch_idx))

        return Gated()

    def run(self) -> None:
        scene = self

        class Remembers(ModelCheckpoint):
            def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
                scene.model.remember()
                super().on_train_batch_end(*args, **kwargs)

            def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                super().on_train_end(trainer, pl_module)
                scene.saved = digests(scene.folder / "checkpoints")
                scene.model.remember()
                scene.model.state["training flags"] = {n: True for n, _ in pl_module.named_modules()}

        gate = {"max_degradation": {"val_loss": 1e-9}, "on_fail": "warn"}
        gptq = GPTQCallback(QuantizeModule(**QUANTIZER), self.folder / "export", overwrite=True, swap=self.swap, **gate)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=self.folder, num_sanity_val_steps=0,
            callbacks=[Remembers(self.folder / "checkpoints", save_last=True), gptq],
        )  # fmt: skip
        loader = DataLoader(samples()[:32], batch_size=8)
        trainer.fit(self.model.model, loader, loader)


class Transformers(Scene):
    """transformers' `Trainer.train` of a model with an adapter."""

    keeps_export = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).train()

    def run(self) -> None:
        scene = self

        class Remembers(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                scene.model.remember()  # the Trainer changes the configuration

            def on_step_end(self, *_: Any, **__: Any) -> None:
                scene.model.remember()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                scene.saved = digests(scene.folder / "checkpoints")
                scene.model.remember()

        gptq = GPTQTrainerCallback(QuantizeModule(**QUANTIZER), self.folder / "export", overwrite=True)
        arguments = TrainingArguments(
            str(self.folder / "checkpoints"), use_cpu=True, max_steps=2, save_steps=1, report_to=[],
            per_device_train_batch_size=8, disable_tqdm=True,
        )  # fmt: skip
        Trainer(self.model.model, arguments, train_dataset=samples(), callbacks=[Remembers(), gptq]).train()

    def check_done(self) -> None:
        load_quantized(self.folder / "export")
        self.check_clean()


class Convert(Scene):
    """`gptq-plugin convert` of an export, beside an earlier one."""

    source = Path()

    def run(self) -> None:
        convert(self.source, self.folder / "export", "gptq_v2", overwrite=True)

    def check_done(self) -> None:
        load_quantized(self.folder / "export")
        self.model.check_is_back()
        self.check_clean()


SCENES: dict[str, Callable[[Path, Path | None], Scene]] = {
    "quantize": Module,
    "streamed": Streamed,
    "experts": Experts,
    "best": Best,
    "finish": Finished,
    "Lightning": Lightning,
    "transformers": Transformers,
    "convert": Convert,
}
