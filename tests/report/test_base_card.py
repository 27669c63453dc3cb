"""The license of a base model, as far as something on disk has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptq_plugin.report.base_card import License, base_license


def write(folder: Path, text: str | bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def test_only_what_the_hub_reads_becomes_metadata() -> None:
    assert License("mit").metadata() == {"license": "mit"}
    assert License("other", "theirs", "https://a.b/c").metadata() == {
        "license": "other",
        "license_name": "theirs",
        "license_link": "https://a.b/c",
    }


def test_nothing_is_known_without_a_card() -> None:
    for name in (None, "", "/no/such/folder", "gpt2"):
        assert base_license(name, None) is None
    assert base_license(None, None, "apache-2.0") == License("apache-2.0")
    assert base_license(None, None, {"a": 1}) is base_license(None, None, "two\nlines") is None


@pytest.mark.parametrize("link", ["LICENSE", "../../etc/passwd", "javascript:alert(1)", "http://insecure.org"])
def test_a_link_that_is_no_address_is_left_out(link: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "base", f"---\nlicense: other\nlicense_link: {link}\n---\n")
    assert base_license(folder, None) == License("other")


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", "no metadata", "---\n: : :\n---\n", "---\nlicense\n---\n", ""])
def test_a_card_that_cannot_be_read_is_none(text: str | bytes, tmp_path: Path) -> None:
    assert base_license(write(tmp_path / "base", text), None) is None
