"""Which folders an export may be written to, and where the work on it is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export.export import Export, export_model
from gptq_plugin.export.export_dir import check_export_dir
from gptq_plugin.export.hidden_folders import hidden_beside, works_inside
from gptq_plugin.model.structure import Structure

from exports import files
from models import Plain
from paths import SUPPORT

Rtn = Callable[..., Any]
LONG = ["n" * 238, "n" * 255, "é" * 127]  # bytes: just too long for the hidden name, the longest, two a character
CONFIG = QuantizeConfig(group_size=16)


def test_another_tools_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}')
    with pytest.raises(ExportError, match="is not an export of gptq_plugin"):
        check_export_dir(tmp_path, overwrite=True)


def test_a_target_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file"):
        check_export_dir(tmp_path / "file")
    with pytest.raises(ExportError, match="file is not a writable folder"):
        check_export_dir(tmp_path / "file" / "below")


def test_a_parent_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere, whatever the mode says
    with pytest.raises(ExportError, match="is not a writable folder"):
        check_export_dir(tmp_path / "a" / "b")


def test_checking_a_folder_creates_nothing(tmp_path: Path) -> None:
    check_export_dir(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    check_export_dir(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_name_that_no_file_system_takes_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"n… has 256 bytes, and a name there may have 255; choose a shorter one"):
        check_export_dir(tmp_path / ("n" * 256))
    with pytest.raises(ExportError, match="é… has 256 bytes"):
        check_export_dir(tmp_path / "new" / ("é" * 128) / "out")
    with pytest.raises(ExportError, match="a path may have"):
        check_export_dir(tmp_path.joinpath(*["n" * 200] * 20))
    assert not list(tmp_path.iterdir())


def test_a_circle_of_links_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for target in ("a", "b/out", "a/new/out"):
        with pytest.raises(
            ExportError, match="cannot write an export to .*(loop|symbolic links).*choose another folder"
        ):
            check_export_dir(tmp_path / target)


@pytest.mark.parametrize("name", ["caf\udce9", "a/caf\udce9/out", "nul\0"])
def test_a_name_that_files_in_it_could_not_have_is_refused_in_words_that_can_be_printed(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="cannot write an export to .*choose another folder") as refused:
        check_export_dir(tmp_path / name)
    str(refused.value).encode("ascii")


def test_the_whole_disk_is_not_walked_to_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("walked"))
    with pytest.raises(ExportError, match="is not an export of gptq_plugin"):
        check_export_dir("/")


def test_an_export_to_the_working_directory_leaves_that_in_place(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    (home / "below").rmdir()
    monkeypatch.chdir(home)
    number = home.stat().st_ino
    for bits in (4, 8):
        config = QuantizeConfig(bits=bits, group_size=16)
        assert export_model(rtn(Plain(), config), ".", config, overwrite=bits == 8) == home
        assert home.stat().st_ino == number and Path.cwd() == home
        assert json.loads(Path("quantize_config.json").read_text())["bits"] == bits
        assert not [name for name in os.listdir() if name.startswith(".")] and list(tmp_path.iterdir()) == [home]
    load_quantized(".", model=Plain())


def test_a_failure_within_the_working_directory_leaves_the_earlier_export(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = rtn(Plain(), CONFIG)
    export_model(model, ".", CONFIG)
    before, renamed, rename = files(tmp_path), [], Path.rename
    for failing in range(2, 11, 2):
        renamed.clear()

        def fails(path: Path, target: Path, failing: int = failing) -> Path:
            renamed.append(path)
            if len(renamed) == failing:
                raise OSError(5, "the disk is broken")
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", fails)
            if failing <= 9:
                with pytest.raises(ExportError, match=r"could not be written: .*the disk is broken.*See to it"):
                    export_model(model, ".", CONFIG, overwrite=True)
        assert files(tmp_path) == before


def test_an_export_into_a_folder_whose_parent_cannot_be_written_to_works_inside_it(
    rtn: Rtn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, access = tmp_path / "out", os.access
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert works_inside(out) and hidden_beside(out, "partial").parent == out
    with Export(Structure.of(Plain()), out, CONFIG):
        (work,) = out.iterdir()
        check_export_dir(out)  # another's work is no file of the folder
    assert not work.exists()
    number = out.stat().st_ino
    export_model(rtn(Plain(), CONFIG), out, CONFIG)
    assert out.stat().st_ino == number
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match="out is not a writable folder"):
        check_export_dir(out, overwrite=True)


def test_a_system_error_of_the_check_is_told_as_one_about_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(ExportError, match=r"cannot write an export to .*out: .*Permission denied; choose another"):
        check_export_dir(tmp_path / "out")


@pytest.mark.parametrize("call", ["mkdir", "rename", "rmdir"])
def test_a_file_system_that_permissions_do_not_tell_of_is_refused_before_the_work(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(os, call)

    def refuses(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(os, call, original)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, call, refuses)
    with pytest.raises(ExportError, match=r"cannot write an export to .*out: .*not permitted.*; choose another"):
        check_export_dir(tmp_path / "out")
    assert not list(tmp_path.iterdir())


MOUNTS = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from gptq_plugin import QuantizeModule, load_quantized
from gptq_plugin.errors import ExportError
from gptq_plugin.export.hidden_folders import is_mount
from models import Plain

def mounted(name, *how):
    Path(name).mkdir()
    subprocess.run(["mount", *how, name], check=True)
    return Path(name).resolve()

Path("source").mkdir()
volumes = [mounted("a volume", "-t", "tmpfs", "tmpfs"), mounted("bound", "--bind", "source")]
(volumes[0] / "lost+found").mkdir()
told = {"mounts": [is_mount(volume) for volume in volumes], "other": is_mount(Path("source").resolve())}
model = Plain()
quantizer = QuantizeModule(group_size=16)
quantizer.round_to_nearest(model)
tokens = torch.arange(32).reshape(2, 16)
for volume in volumes:
    for overwrite in (False, True):
        quantizer.export(model, volume, overwrite=overwrite)
    same = torch.equal(load_quantized(volume, model=Plain())(tokens), model(tokens))
    told[volume.name] = [same, sorted(entry.name for entry in volume.iterdir())]
layers = mounted("layers", "-t", "tmpfs", "tmpfs")
for name in ("image", "upper", "work"):
    (layers / name).mkdir()
quantizer.export(model, layers / "image" / "out")
below = f"lowerdir={layers}/image,upperdir={layers}/upper,workdir={layers}/work,redirect_dir=off"
overlay = mounted("overlay", "-t", "overlay", "-o", below, "overlay")
quantizer.export(model, overlay / "out", overwrite=True)
same = torch.equal(load_quantized(overlay / "out", model=Plain())(tokens), model(tokens))
new = {path.name for path in (layers / "upper" / "out").iterdir()}
told["overlay"] = [same, os.listdir(overlay), sorted(os.listdir(overlay / "out")), "model.safetensors" in new]
small = mounted("small", "-t", "tmpfs", "-o", "size=8k", "tmpfs")
for name in ("small", "small/below"):
    try:
        quantizer.export(model, name)
    except ExportError as error:
        told[name] = str(error)
told["left"] = [entry.name for entry in small.rglob("*")]
try:
    QuantizeModule(group_size=16).quantize(Plain(), [tokens], export_dir="small/out")
except ExportError as error:
    told["before"] = str(error)
print(json.dumps(told))
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="needs to mount"
)
def test_mount_points_are_written_inside_and_full_ones_named_with_the_bytes(tmp_path: Path) -> None:
    run = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTS, SUPPORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["mounts"] == [True, True] and told["other"] is False
    written = ["README.md", "config.json", "model.safetensors", "quantization_report.json", "quantize_config.json"]
    assert told["bound"] == [True, [*written, "report.html"]]
    assert told["a volume"] == [True, sorted(["lost+found", *written, "report.html"])]
    assert told["overlay"] == [True, ["out"], [*written, "report.html"], True]
    for name in ("small", "small/below"):
        assert "could not be written" in told[name] and "No space left" in told[name]
        assert "bytes, and 4096 are free there: make room" in told[name]
    assert told["left"] == []
    assert "out needs about" in told["before"] and "bytes, and 8192 are free there" in told["before"]
