"""Reading the folder of a sharded checkpoint in one process, without running code from it."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import pretrained
from gptq_plugin.apps.sharded_weights import read_sharded, sharded_tensors
from gptq_plugin.errors import CheckpointError

from forked_python import python
from language_models import same_weights, save_sharded, tiny


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
    done = subprocess.run([python(), "run.py", base[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run.ckpt" / ".metadata").is_file()
    loaded = fine_tuned(pretrained([], name_or_path=str(base[0])).network, ckpt=tmp_path / "run.ckpt")
    whole = torch.load(tmp_path / "whole.pt")
    assert not torch.equal(whole["lm_head.weight" if "lm_head.weight" in whole else "model.embed_tokens.weight"],
                           base[1].lm_head.weight)  # fmt: skip
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_a_sharded_checkpoint_cut_off_is_refused(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read as a sharded checkpoint"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)


def test_code_in_a_sharded_checkpoint_is_not_run(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="its index names .*which is not part of one"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_tells_the_shapes_of_its_tensors_and_fills_them_in_their_dtype(tmp_path):
    linear = torch.nn.Linear(3, 2)
    folder = save_sharded(linear, tmp_path / "run.ckpt")
    sizes = {name: entry.size for name, entry in sharded_tensors(folder).items()}
    assert sizes == {"state_dict.weight": (2, 3), "state_dict.bias": (2,)}
    tensors = {"state_dict.weight": torch.zeros(2, 3, dtype=torch.float64)}
    read_sharded(folder, tensors)
    assert torch.equal(tensors["state_dict.weight"], linear.weight.double())


@pytest.mark.parametrize("elsewhere", ["../elsewhere.distcp", "/elsewhere.distcp", "sub/elsewhere.distcp"])
def test_an_index_that_points_outside_the_folder_is_refused(elsewhere, tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    index = pickle.loads((folder / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = elsewhere
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"its index names .*which is no file of the folder"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64])
def test_tensors_that_are_no_values_of_a_weight_are_refused_before_one_is_read(dtype, tmp_path):
    network = torch.nn.Linear(3, 2)
    before = network.weight.clone()
    state = {"weight": torch.ones(2, 3, dtype=dtype), "bias": torch.ones(2)}
    dcp.save({"state_dict": state}, checkpoint_id=tmp_path / "run.ckpt", no_dist=True)
    with pytest.raises(CheckpointError, match=r"run\.ckpt holds state_dict\.weight .*only dense tensors are read"):
        fine_tuned(network, ckpt=tmp_path / "run.ckpt")
    assert torch.equal(network.weight, before)


def test_bytes_that_are_not_those_that_were_written_are_seen_before_one_is_read(tmp_path):
    folder = save_sharded(torch.nn.Linear(30, 20), tmp_path / "run.ckpt")
    network = torch.nn.Linear(30, 20)
    before = network.weight.clone()
    (shard,) = folder.glob("*.distcp")
    data = bytearray(shard.read_bytes())
    values = data.index(torch.load(io.BytesIO(_item(folder, shard)), weights_only=True).numpy().tobytes())
    data[values + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"run\.ckpt cannot be read .*not those that were written"):
        fine_tuned(network, ckpt=folder)
    assert torch.equal(network.weight, before)


def _item(folder, shard):
    """The bytes of the weight."""
    stored = dcp.FileSystemReader(folder).read_metadata().storage_data
    info = next(info for index, info in stored.items() if index.fqn.endswith("weight"))
    return shard.read_bytes()[info.offset : info.offset + info.length]


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    (shard,) = folder.glob("*.distcp")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="which is no file of the folder"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_with_holes_is_refused_before_it_is_read(name, tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    with (folder / name).open("r+b") as file:
        file.truncate(1 << 36)
    with pytest.raises(pickle.UnpicklingError, match=f"{name} is a sparse file"):
        read_sharded(folder, {"state_dict.weight": torch.zeros(2, 3)})
