"""Room for an export is asked for before the work, and a full disk is told with its bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.checkpoint.sizes import stored_bytes
from gptq_plugin.errors import ExportError
from gptq_plugin.export import convert as convert_module
from gptq_plugin.export import export as export_module
from gptq_plugin.export.convert import convert
from gptq_plugin.export.disk_space import disk_errors_explained, free_bytes, refuse_full
from gptq_plugin.export.export import export_model
from gptq_plugin.quantize.prepare import budgeted
from gptq_plugin.training.preflight import refuse_export

from models import Plain, tiny_llama

Rtn = Callable[..., Any]


def leave(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 10**6) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=total))


def test_room_is_asked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 1000)
    words = r"out needs about \d{4,5} bytes, and 1000 are free there: make room, or choose another folder"
    with pytest.raises(ExportError, match=words):
        QuantizeModule(group_size=16).quantize(Plain(), [torch.arange(32)] * 8, export_dir=tmp_path / "out")
    with pytest.raises(ExportError, match=words):
        refuse_export(QuantizeModule(group_size=16), Plain(), tmp_path / "out", None)
    refuse_export(QuantizeModule(group_size=16), Plain(), None, None)
    assert not list(tmp_path.iterdir())


def test_what_a_planned_export_takes_is_near_what_it_took(
    tmp_path: Path, rtn: Rtn, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(group_size=32)
    model = tiny_llama()
    took = None
    folder = export_model(rtn(tiny_llama(), config), tmp_path / "out", config)
    took = (folder / "model.safetensors").stat().st_size
    for free in (int(took * 0.5), int(took * 1.01)):
        leave(monkeypatch, free)
        try:
            refuse_export(QuantizeModule(config), model, tmp_path / "new", None)
        except ExportError:
            assert free < took
        else:
            assert free > took


def test_layers_that_wait_for_their_file_take_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, model = QuantizeModule(group_size=16), tiny_llama()

    def needed() -> int:
        leave(monkeypatch, 0)
        with pytest.raises(ExportError) as refused:
            refuse_export(quantizer, model, tmp_path / "out", None)
        return int(re.search(r"needs about (\d+) bytes", str(refused.value))[1])  # type: ignore[index]

    alone = needed()
    monkeypatch.setattr(export_module, "PIECE", 1_000)
    packed = needed() - alone
    with budgeted(model, quantizer.config, None) as plan:
        assert packed == sum(stored_bytes(target.shape, target.config) for target in plan.targets)
    monkeypatch.setattr(export_module, "SHARD", 5_000)
    assert needed() == alone + 5_000 < alone + packed
    model.model.layers.to("meta")  # in the place of a GPU, from which layers go to their file at once
    assert needed() == alone


def test_a_file_system_that_tells_no_size_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 0, total=0)
    assert free_bytes(tmp_path / "new" / "folder") is None
    refuse_full(tmp_path, 10**15)


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), SafetensorError("I/O error: os error 28"), Exception("full (os error 28)")]
)
def test_errors_of_the_disk_name_folder_and_bytes(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"new could not be written: .*28.* It needs 77 bytes, and \d+ are free there"),
        disk_errors_explained(tmp_path / "new", lambda: 77),
    ):
        raise error
    with (
        pytest.raises(ExportError, match=r"new could not be written: .*cross-device. See to it, or choose another"),
        disk_errors_explained(tmp_path / "new", lambda: 77),
    ):
        raise OSError(18, "cross-device")
    with pytest.raises(Exception, match="^another$"), disk_errors_explained(tmp_path, lambda: 77):
        raise Exception("another")
    with pytest.raises(KeyError), disk_errors_explained(tmp_path, lambda: 77):
        raise KeyError


def test_a_full_disk_under_the_float_rest_is_told_too(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes that, and raises what safetensors does."""

    def fails(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    config = QuantizeConfig(group_size=32)
    model = rtn(tiny_llama(), config)
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(
        ExportError, match=r"out could not be written: .*No space left.* needs \d+ bytes, and \d+ are free"
    ):
        export_model(model, tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_convert_tells_a_full_disk_before_and_during_the_work(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(group_size=32)
    source = export_model(rtn(tiny_llama(), config), tmp_path / "source", config)
    with monkeypatch.context() as patched:
        leave(patched, 10)
        with pytest.raises(ExportError, match=r"out needs about \d+ bytes, and 10 are free"):
            convert(source, tmp_path / "out", "gptq_v2")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_json", fails)
    with pytest.raises(ExportError, match=r"out could not be written: .*No space left.* bytes are free|bytes, and"):
        convert(source, tmp_path / "out", "gptq_v2")
    assert list(tmp_path.iterdir()) == [source]
