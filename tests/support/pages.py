"""The pages that people read, README and docs/, and the code and commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from paths import REPOSITORY

DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"


def pages() -> list[Path]:
    """README and every page of the site that people wrote."""
    generated = {DOCS / "clients.md", DOCS / "architectures.md", DOCS / "mutation.md"}
    return [README, *sorted(set(DOCS.rglob("*.md")) - generated)]


def name(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The text of its code blocks that begin with exactly ```language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The commands of its bash blocks, indented ones too, each as a list of words, less variables set before it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    found.append(words)
    return found


def links(page: Path) -> list[str]:
    """Where its Markdown links and pictures point."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)
