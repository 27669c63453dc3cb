"""The weights of Lightning's checkpoints, of files and of folders."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import pretrained
from gptq_plugin.errors import CheckpointError

from language_models import same_weights, save_checkpoint, save_fsdp, save_sharded, tiny


@pytest.mark.parametrize("save", [save_checkpoint, save_sharded, save_fsdp])
def test_a_lightning_checkpoint_brings_its_weights(base, tmp_path, save):
    trained = tiny(2)
    ckpt = save(trained, tmp_path / "run.ckpt")
    for weights in (True, False):
        loaded = pretrained([], name_or_path=str(base[0]), weights=weights).network
        assert not torch.equal(loaded.lm_head.weight, trained.network.lm_head.weight)
        same_weights(fine_tuned(loaded, ckpt=ckpt), trained.network)


def test_a_sharded_checkpoint_is_read_into_another_dtype(base, tmp_path):
    trained = tiny(2)
    folder = save_sharded(trained, tmp_path / "run.ckpt")
    loaded = fine_tuned(pretrained([], name_or_path=str(base[0]), dtype="bfloat16").network, ckpt=folder)
    same_weights(loaded, trained.network.to(torch.bfloat16))


@pytest.mark.slow
def test_the_folder_of_a_model_parallel_run_on_two_processes_is_read(base, tmp_path):
    (tmp_path / "run.py").write_text(
        textwrap.dedent("""
        import sys
        import torch
        from lightning import LightningModule, Trainer
        from lightning.pytorch.strategies import ModelParallelStrategy
        from torch.distributed.fsdp import fully_shard
        from torch.utils.data import DataLoader
        from transformers import AutoModelForCausalLM

        class Run(LightningModule):
            def __init__(self):
                super().__init__()
                self.network = AutoModelForCausalLM.from_pretrained(sys.argv[1])

            def configure_model(self):
                fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

            def training_step(self, batch, index):
                return self.network(input_ids=batch, labels=batch).loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.5)

            def on_train_end(self):
                whole = {name: p.full_tensor() for name, p in self.network.named_parameters()}
                if self.trainer.is_global_zero:
                    torch.save(whole, "whole.pt")

        trainer = Trainer(strategy=ModelParallelStrategy(2, 1), accelerator="cpu", devices=2,
                          max_steps=2, logger=False, enable_progress_bar=False, enable_checkpointing=False)
        trainer.fit(Run(), DataLoader(torch.randint(0, 250, (8, 12)), batch_size=2))
        trainer.save_checkpoint("run.ckpt")
        """)
    )
    done = subprocess.run([sys.executable, "run.py", base[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run.ckpt" / ".metadata").is_file()
    loaded = fine_tuned(pretrained([], name_or_path=str(base[0])).network, ckpt=tmp_path / "run.ckpt")
    whole = torch.load(tmp_path / "whole.pt")
    assert not torch.equal(whole["lm_head.weight" if "lm_head.weight" in whole else "model.embed_tokens.weight"],
                           base[1].lm_head.weight)  # fmt: skip
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    network = torch.nn.Linear(3, 2)
    torch.save({"state_dict": {"net.weight": torch.zeros(2, 4), "net.bias": torch.zeros(2)}}, tmp_path / "other.ckpt")
    torch.save({"weights": 1}, tmp_path / "none.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "folder").mkdir()
    save_sharded(torch.nn.Linear(4, 2), tmp_path / "sharded")
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="has no state_dict"):
        fine_tuned(network, ckpt=tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        fine_tuned(network, ckpt=tmp_path / "broken.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fine_tuned(network, ckpt=tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match=r"folder without \.metadata"):
        fine_tuned(network, ckpt=tmp_path / "folder")
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "sharded")
