"""The sections of a model card on loading the export with each client: `loading_sections`."""

from __future__ import annotations

from gptq_plugin.clients.client import CLIENTS, rules_of
from gptq_plugin.clients.published import Published


def loading_sections(published: Published) -> list[str]:
    """A section of Markdown for each client that has one, by name; none for models that transformers does not load."""
    if published.facts.loader is None:
        return []
    rules = [rules_of(name) for name in sorted(CLIENTS)]
    return [each.loading(published) for each in rules if each.loading is not None]
