"""Tiny language models, and checkpoints of them as Lightning's strategies write them."""

from __future__ import annotations

import torch
from lightning import Trainer
from torch.distributed import checkpoint as dcp

from gptq_plugin.apps.language_model import small_llama

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


WORDS = ["some text to learn from"] * 9


def tiny(seed):
    torch.manual_seed(seed)
    return small_llama(WORDS, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1)


def save_checkpoint(module, path):
    """As the Trainer writes one."""
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def save_sharded(module, folder, key="state_dict"):
    """The folder ModelParallelStrategy writes: the distributed checkpoint and meta.pt beside it."""
    state = {key: module.state_dict(), "optimizer_0": {"param_groups": [{"lr": 1e-3}]}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1, "global_step": 7}, folder / "meta.pt")
    return folder


def save_fsdp(module, folder):
    """The folder FSDPStrategy writes; read from its source, since it needs GPUs."""
    return save_sharded(module, folder, key="model")


def same_weights(network, other):
    state = other.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
