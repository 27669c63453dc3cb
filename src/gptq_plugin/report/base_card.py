"""The license of the model that was trained, as its own card has it: `base_license`."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptq_plugin.options.limited_files import read_text

_CARD = "README.md"
_METADATA = 2**18  # letters of a card, of which its metadata are the first
_KEY = re.compile(r"(license(?:_name|_link)?)[ \t]*:[ \t]+([\w'\"].{0,600})")
_ID = re.compile(r"[\w.-]{1,64}")  # the hub's identifiers: apache-2.0, llama3.1, other
_NAME = re.compile(r"[\w.+ -]{1,96}")
_LINK = re.compile(r"https://[^\s<>\"'`]{1,500}")


@dataclass(frozen=True)
class License:
    """A license in the hub's terms (https://huggingface.co/docs/hub/model-cards#specifying-a-license).

    Attributes:
        id: Its identifier, such as ``apache-2.0``; ``other`` for one that the hub does not list.
        name: Its name, for ``other``.
        link: Address of its text, for ``other``.
    """

    id: str
    name: str = ""
    link: str = ""

    def metadata(self) -> dict[str, str]:
        """The card's keys."""
        keys = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in keys.items() if value}


def base_license(name_or_path: str | None, hub_id: str | None, stated: Any = None) -> License | None:
    """The license in the card of a model on disk, in its own folder or the hub's cache; nothing is downloaded.

    Args:
        name_or_path: As transformers knows the model (``config._name_or_path``).
        hub_id: The same if it is an id on the hub.
        stated: What the model's configuration states, for a model whose card has none.

    Returns:
        None if neither has a license.
    """
    return _of_card(_card(name_or_path, hub_id), hub_id) or (License(stated) if _plain(stated, _ID) else None)


def _of_card(card: Path | None, hub_id: str | None) -> License | None:
    if card is None:
        return None
    try:
        data = _license_keys(read_text(card)[:_METADATA])
    except (OSError, ValueError):  # unreadable, or no text: a card of somebody else
        return None
    kind, link = _plain(data.get("license"), _ID), _plain(data.get("license_link"), _LINK)
    if not kind:
        return None
    if not link and hub_id and re.fullmatch(r"[\w.-]+", str(data.get("license_link") or "")):
        link = f"https://huggingface.co/{hub_id}/blob/main/{data['license_link']}"  # a file of that repository
    return License(kind, _plain(data.get("license_name"), _NAME), link)


def _license_keys(text: str) -> dict[str, Any]:
    """The license's keys of a card's metadata whose values are on their own line.

    The other metadata are not parsed: YAML of a stranger may take any time (merged keys), and nest without end.
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    found: dict[str, Any] = {}
    for line, following in itertools.pairwise([*lines[1:], "---"]):
        if line.rstrip() == "---":
            break
        key = _KEY.fullmatch(line)
        if key is not None:
            found[key[1]] = None if following.startswith((" ", "\t")) else _scalar(key[2])
    return found


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None


def _card(name_or_path: str | None, hub_id: str | None) -> Path | None:
    if not name_or_path:
        return None
    folder = Path(name_or_path)
    if (folder / _CARD).is_file():
        return folder / _CARD
    if hub_id is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, _CARD)
    return Path(cached) if isinstance(cached, str) else None


def _plain(value: Any, pattern: re.Pattern[str]) -> str:
    """A text that may be published as it is; else empty."""
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""
