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


MERGED = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]  # 9 ** 11 merges
HOSTILE = {
    "merged keys": ["a0: &a0 {k: v}", *MERGED],
    "deep": [f"a: {'[' * 100_000}"],
    "deep blocks": [f"{' ' * depth}a:" for depth in range(500)],
    "a key that is no text": ["1: 2"],
    "a key of Python's": ["self: 2", "ignore_metadata_errors: 3"],
    "results that are none": ["eval_results: [5]", "model_name: x", "model-index: 5"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_else_a_strangers_card_holds_is_not_parsed(name: str, tmp_path: Path) -> None:
    text = "\n".join(["---", *HOSTILE[name], "license: mit", "---"])
    assert base_license(write(tmp_path / "base", text), None) == License("mit")


@pytest.mark.parametrize(
    "value",
    ["[mit]", "*a", "!!str mit", "{a: b}", "|", "null", "3", "mit: x", '"mit', "mit\n  license", f"x{'y' * 700}"],
)
def test_a_value_that_is_no_text_on_its_line_is_none(value: str, tmp_path: Path) -> None:
    assert base_license(write(tmp_path / "base", f"---\nlicense: {value}\n---\n"), None) is None


def test_a_text_may_be_quoted_and_have_a_comment_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    text = "---\nlicense: gpl\n license: indented\nlicense : 'mit'  # as ever\n---\nlicense: below\n"
    assert base_license(write(tmp_path / "base", text), None) == License("mit")
