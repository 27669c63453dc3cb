"""Both callbacks upload what they exported, when all else is done; against a server like the hub."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from gptq_plugin import GPTQCallback, GPTQTrainerCallback, QuantizeModule, distributed, load_quantized
from gptq_plugin.errors import ExportError

from hub_uploads import Repo, hub_for_uploads
from lightning_runs import Holds, token_loader
from trainer_runs import SMALL, llama, quantized, train

NAME = "org/tuned-4bit"


def in_lightning(tmp_path, **options):
    module, callback = Holds(), GPTQCallback(QuantizeModule(**SMALL), tmp_path / "out", **options)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path / "run",
    )  # fmt: skip
    trainer.fit(module, token_loader())
    return module


def in_transformers(tmp_path, **options):
    model = llama()
    train(model, [GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", **options)], tmp_path)
    return model


BOTH = pytest.mark.parametrize("run", [in_lightning, in_transformers])


@pytest.fixture
def hub():
    with hub_for_uploads() as hub:
        yield hub


@BOTH
def test_a_run_ends_with_its_export_on_the_hub_in_one_commit(run, tmp_path, hub):
    model = run(tmp_path, push_to_hub=NAME)
    repo = hub.repos[NAME]
    assert repo.private and len(repo.commits) == 1 and quantized(model)
    assert repo.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@BOTH
def test_a_repository_that_takes_no_export_is_refused_before_training(run, tmp_path, hub):
    hub.repos[NAME] = Repo(False)
    with pytest.raises(ExportError, match="is public"):
        run(tmp_path, push_to_hub={"repo_id": NAME})
    assert not (tmp_path / "out").exists() and hub.repos[NAME].commits == []


@BOTH
def test_a_failed_upload_ends_the_run_and_leaves_the_export(run, tmp_path, hub):
    hub.broken = "/commit/"
    with pytest.raises(ExportError, match=f"gptq-plugin push {tmp_path / 'out'} {NAME}"):
        run(tmp_path, push_to_hub=NAME)
    assert load_quantized(tmp_path / "out") and hub.repos[NAME].files == {}


def test_only_rank_0_asks_the_hub(tmp_path, hub, monkeypatch):
    callback = GPTQTrainerCallback(QuantizeModule(**SMALL), tmp_path / "out", push_to_hub=NAME)
    with monkeypatch.context() as other:
        other.setattr(distributed, "rank", lambda: 1)
        callback.agree_on_export_dir([])
        callback.upload()
    assert hub.requests == []
    callback.agree_on_export_dir([])
    assert hub.requests


@pytest.mark.parametrize("kind", [GPTQCallback, GPTQTrainerCallback])
@pytest.mark.parametrize(
    ("export_dir", "push_to_hub", "told"),
    [(None, NAME, "give an export_dir"), ("out", "tuned", "owner/name"), ("out", {"private": True}, "'repo_id'")],
)
def test_what_could_not_be_pushed_is_refused_when_the_callback_is_made(kind, export_dir, push_to_hub, told):
    with pytest.raises(ValueError, match=told):
        kind(QuantizeModule(**SMALL), export_dir, push_to_hub=push_to_hub)
