"""What a file system refuses is told with the remedy."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from gptq_plugin import QuantizeConfig
from gptq_plugin.errors import ExportError
from gptq_plugin.export import export, staging
from gptq_plugin.export.convert import convert
from gptq_plugin.export.export import export_model

from models import Plain
from paths import FIXTURES

ERRORS = [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_full_disk_is_told_and_leaves_nothing(
    error: Exception, rtn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    config = QuantizeConfig(group_size=16)
    for owner, name in ((export, "write_quantize_config"), (staging, "_flush")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ExportError, match=r"could not be written: .*No space left.*Make room there"):
                export_model(rtn(Plain(), config), tmp_path / "out", config)
            if owner is staging:
                with pytest.raises(ExportError, match=r"could not be written: .*No space left.*Make room there"):
                    convert(FIXTURES / "gptqmodel-w4g32", tmp_path / "out", "gptq_v2")
        assert not list(tmp_path.iterdir())
