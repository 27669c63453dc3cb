"""Options that a configuration would have with another choice of a group: `Options`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from gptq_plugin.apps.nearest_option import TARGET, known_part, nearest

# Choices of its groups that a command has no use for, by its configuration's name, and what to do instead.
UNUSED = {
    ("quantize", "model=small_llama"): "its weights are random, and gptq-finetune trains them. Give "
    "model.name_or_path=PATH_OR_HUB_ID, such as the folder float/ of such a run"
}


@dataclass(frozen=True)
class Options:
    """The options of a command line's configuration, and of the choices it does not make. Hydra must be initialized.

    Attributes:
        config_name: ``"finetune"`` or ``"quantize"``.
        tree: The configuration, with Hydra's part.
    """

    config_name: str
    tree: Mapping[str, Any]

    def chosen(self, part: str) -> str | None:
        """The choice of the group that an option belongs to; None if it belongs to none."""
        choices: Mapping[str, str] = self.tree["hydra"]["runtime"]["choices"]
        return choices.get(part.partition(".")[0]) if part else None

    def nearer(self, key: str, near: str | None) -> list[tuple[str, str]]:
        """Options of other choices that are more like `key` than `near`, the most alike of this configuration.

        Returns:
            For each choice with such an option, the choice as it is written (``data=text``) and the option.
        """
        found: dict[tuple[str, str], tuple[bool, float]] = {}
        for choice, part in self._others:
            option = nearest(key, part)
            if option is not None and known_part(option, self.tree)[0]:
                found[choice, option] = _likeness(key, option)
        best = max(found.values(), default=(False, 0.0))
        if near is not None and best <= _likeness(key, near):
            return []
        return [one for one, likeness in found.items() if likeness == best]

    def only_in(self, key: str) -> list[tuple[str, str]]:
        """The other choices that have an option of this name, as `nearer` gives them, if these have not."""
        return [one for one in self.nearer(key, None) if one[1] == key]

    def of_other_choices(self, part: str) -> Iterator[tuple[str, list[str]]]:
        """Yields each other choice with the options that it would add to a part of the configuration."""
        for choice, tree in self._others if part else ():
            missing, _, node = known_part(part, tree)
            here = known_part(part, self.tree)[2]
            new = [str(name) for name in node if name not in here and name != TARGET] if not missing and node else []
            if new:
                yield choice, new

    @cached_property
    def _others(self) -> list[tuple[str, dict[str, Any]]]:
        """Every choice that is not made, with the part of the configuration that it would fill."""
        loader = GlobalHydra.instance().config_loader()
        parts = []
        for group in self.tree["hydra"]["runtime"]["choices"]:
            if group.startswith("hydra/") or group not in self.tree:
                continue
            for option in loader.get_group_options(group):
                if option != self.chosen(group) and (self.config_name, f"{group}={option}") not in UNUSED:
                    filled = compose(self.config_name, [f"{group}={option}"])[group]
                    parts.append((f"{group}={option}", {group: OmegaConf.to_container(filled, resolve=False)}))
        return parts


def _likeness(key: str, option: str) -> tuple[bool, float]:
    """Whether two names are one, and how much their last parts are alike."""
    return key == option, SequenceMatcher(None, key.rpartition(".")[2], option.rpartition(".")[2]).ratio()
