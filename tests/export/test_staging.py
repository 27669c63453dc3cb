"""A folder that is there as a whole or not at all, and what may be replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export import staging
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.hidden_folders import hidden_beside
from gptq_plugin.model.structure import Structure

from exports import Tokenizer, description, files
from models import Plain

Rtn = Callable[..., Any]


def test_a_folder_that_is_not_ours_is_never_replaced(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="is not an export of gptq_plugin"):
            check_export_dir(target, overwrite)
        with pytest.raises(ExportError, match="is not an export of gptq_plugin"):
            export_model(rtn(Plain(), config), target, config, overwrite=overwrite)
    assert files(target) == {"thesis.txt": b"years of work"}


def test_an_earlier_export_is_replaced_only_on_request(rtn: Rtn, tmp_path: Path) -> None:
    config, other = QuantizeConfig(group_size=16), QuantizeConfig(bits=8, group_size=16)
    target = export_model(rtn(Plain(), config), tmp_path / "out", config, tokenizer=Tokenizer())
    with pytest.raises(ExportError, match="pass overwrite=True"):
        check_export_dir(target)
    model = rtn(Plain(), other)
    with pytest.raises(ExportError, match="pass overwrite=True"):
        export_model(model, target, other)
    export_model(model, target, other, overwrite=True)
    assert description(target)["bits"] == 8
    assert not (target / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_cannot_be_flushed_once_the_folder_is_in_place_is_told_and_fails_nothing(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, own = QuantizeConfig(group_size=16), staging._sync

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        own(path)

    monkeypatch.setattr(staging, "_sync", sync)
    model = rtn(Plain(), config)
    for overwrite in (False, True):
        export_model(model, tmp_path / "out", config, overwrite=overwrite)
    assert caplog.text.count("is in place, and the disk may not keep it: [Errno 5]") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_someone_added_to_an_export_are_not_deleted_with_it(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    target = export_model(rtn(Plain(), config), tmp_path / "out", config)
    (target / "notes.md").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.md.*move them away"):
        export_model(rtn(Plain(), config), target, config, overwrite=True)
    assert (target / "notes.md").read_text() == "mine"


def test_what_a_killed_export_left_is_removed_by_the_next_and_a_running_one_is_not(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    killed, sharded, other, foreign = (
        tmp_path / f".{name}"
        for name in ("out.11111111.partial", "out.11111111.unsharded", "o.11111111.partial", "out.mine.partial")
    )
    for folder in (killed, sharded, other, foreign):
        (folder / "inside").mkdir(parents=True)
    model = rtn(Plain(), config)
    with Export(Structure.of(model), tmp_path / "out", config):
        (running,) = set(tmp_path.glob(".out.*")) - {killed, sharded, foreign}
        export_model(model, tmp_path / "out", config)
        assert set(tmp_path.iterdir()) == {tmp_path / "out", other, foreign, running}
    assert not running.exists()


def test_files_have_the_permissions_of_any_new_file(rtn: Rtn, tmp_path: Path) -> None:
    config = QuantizeConfig(group_size=16)
    folder = export_model(rtn(Plain(), config), tmp_path / "out", config)
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


LONG = ["n" * 238, "n" * 255, "é" * 127]  # bytes: just too long for the hidden name, the longest, two a character


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_permissions_and_flushes_takes_an_export_with_a_warning(
    code: int, rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(code: int) -> Callable[..., None]:
        def fails(*_: Any, **__: Any) -> None:
            raise OSError(code, os.strerror(code))

        return fails

    model = rtn(Plain(), QuantizeConfig(group_size=16))
    monkeypatch.setattr(os, "chmod", refuses(code))
    monkeypatch.setattr(os, "fsync", refuses(errno.EINVAL))
    folder = export_model(model, tmp_path / "out", QuantizeConfig(group_size=16))
    load_quantized(folder, model=Plain())
    assert "does not let permissions be set, so others may not read" in caplog.text
    monkeypatch.setattr(os, "fsync", refuses(errno.EIO))
    with pytest.raises(ExportError, match="could not be written: .*Input/output error"):
        export_model(model, tmp_path / "other", QuantizeConfig(group_size=16))


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("exchanges", [True, False])
def test_a_name_that_leaves_no_room_for_a_hidden_one_beside_it_is_written_and_replaced(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    config, target = QuantizeConfig(group_size=16), tmp_path / name
    for bits in (4, 8):
        config = QuantizeConfig(bits=bits, group_size=16)
        export_model(rtn(Plain(), config), target, config, overwrite=True)
        assert description(target)["bits"] == bits
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_leftovers_beside_a_long_name_are_removed(rtn: Rtn, tmp_path: Path) -> None:
    config, target = QuantizeConfig(group_size=16), tmp_path / LONG[1]
    left = hidden_beside(target, "partial")
    left.mkdir()
    export_model(rtn(Plain(), config), target, config)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


class LinkingTokenizer:
    """Leaves a link to a file that is not the export's."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").symlink_to(self.file)


def test_a_link_in_an_export_becomes_the_file_and_what_it_led_to_keeps_its_mode(rtn: Rtn, tmp_path: Path) -> None:
    outside = tmp_path / "tokenizer.json"
    outside.write_text("{}")
    outside.chmod(0o600)
    config = QuantizeConfig(group_size=16)
    out = export_model(rtn(Plain(), config), tmp_path / "out", config, tokenizer=LinkingTokenizer(outside))
    assert outside.stat().st_mode & 0o777 == 0o600
    assert not (out / "tokenizer.json").is_symlink() and (out / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ExportError, match=r"tokenizer\.json of the export is neither a file nor a folder"):
        export_model(rtn(Plain(), config), tmp_path / "other", config, tokenizer=LinkingTokenizer(tmp_path / "out"))
