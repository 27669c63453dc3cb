"""The findings of a check, `Finding`, and its whole result, `Lint`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from gptq_plugin.clients.client import Client


@dataclass(frozen=True)
class Finding:
    """A fault of the checkpoint: an ``"error"`` (numbers are wrong, or it cannot load) or a ``"warning"``."""

    level: Literal["error", "warning"]
    message: str


@dataclass
class Lint:
    """The result of `lint`.

    Attributes:
        facts: Properties of the checkpoint, by heading.
        findings: In the order they were found.
        refusals: By client, why it does not take the checkpoint; an empty list where it does.
        conditions: By client, what it needs beside the checkpoint.
    """

    facts: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    refusals: dict[Client, list[str]] = field(default_factory=dict)
    conditions: dict[Client, list[str]] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        """The messages of the errors."""
        return [finding.message for finding in self.findings if finding.level == "error"]

    def add(self, findings: Iterable[Finding]) -> None:
        """Appends findings."""
        self.findings += findings


def error(message: str) -> Finding:
    """A finding that makes the checkpoint wrong."""
    return Finding("error", message)


def warning(message: str) -> Finding:
    """A finding that may be intended."""
    return Finding("warning", message)
