"""The help of the Hydra commands: what each does, examples, and every option with its comment from ``conf/``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from gptq_plugin.apps.option_names import CONF
from gptq_plugin.apps.other_choices import UNUSED

_ABOUT = {
    "finetune": """\
gptq-finetune fine-tunes a language model, quantizes it with GPTQ at the end of the training, exports it, loads the
export again in a new process, and compares it with the float model.""",
    "quantize": """\
gptq-quantize quantizes a language model with GPTQ, fine-tuned or not, exports it, loads the export again in a new
process, and compares it with the float model.""",
}
_EXAMPLES = {
    "finetune": """\
  # a small Llama, on the text that every Python carries
  gptq-finetune
  # a model and text of your own, to 3 bits
  gptq-finetune model=hf model.name_or_path=PATH_OR_HUB_ID data=text data.path='texts/*.txt' \\
      trainer.max_steps=200 quantizer=w3g128
  # chats: rows with messages, through the tokenizer's chat template
  gptq-finetune model=hf model.name_or_path=PATH_OR_HUB_ID data=text data.path=chats.jsonl data.column=messages
  # refuse an export whose loss on held-out text is more than 2 % higher, or that vLLM would not load
  gptq-finetune callbacks.gptq.target=vllm 'callbacks.gptq.max_degradation={val_loss:2%}'
  # once for each width, and one table
  gptq-finetune -m quantizer.bits=2,3,4,8""",
    "quantize": """\
  # a model as it is
  gptq-quantize model.name_or_path=PATH_OR_HUB_ID data=text data.path=calibration.jsonl
  # after a fine-tune: its Lightning checkpoint, or its PEFT adapter
  gptq-quantize model.name_or_path=BASE ckpt=last.ckpt data=hub
  gptq-quantize model.name_or_path=BASE adapter=FOLDER data=hub
  # for vLLM, to a folder of your choice
  gptq-quantize model.name_or_path=PATH_OR_HUB_ID export_dir=out target=vllm model.dtype=float16
  # once for each width, and one table
  gptq-quantize -m model.name_or_path=PATH_OR_HUB_ID quantizer.bits=2,3,4,8""",
}
_FLAGS = """\
  --cfg job       print the configuration that a command line gives, and end
  -m              run once for each combination of values with commas: quantizer.bits=3,4
  --version       print the version of gptq-plugin, and end
  --hydra-help    Hydra's other flags"""


class Comments(NamedTuple):
    """The comments of one option: lines above it, and text behind its value."""

    above: tuple[str, ...]
    behind: str


def help_text(config_name: str, overrides: Sequence[str] = ()) -> str:
    """Returns the help of a command, with the options as `overrides` leave them.

    Args:
        config_name: ``"finetune"`` or ``"quantize"``.
        overrides: As on the command line; choices such as ``data=text`` put other options in.
    """
    with initialize_config_module(CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        tree: Any = OmegaConf.to_container(compose(config_name, list(overrides)), resolve=False)
        parts = loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).defaults
        own = {str(part.config_path).partition("/")[0] for part in parts}
        groups = {
            group: [one for one in loader.get_group_options(group) if (config_name, f"{group}={one}") not in UNUSED]
            for group in loader.list_groups("")
            if group in own
        }
    comments: dict[tuple[str, ...], Comments] = {}
    chosen = set()
    for part in parts:
        path, package = str(part.config_path), part.package or ""
        text = _conf_text(path)
        if text is not None:
            chosen.add(path)
            under = tuple(package.split(".")) if package else ()
            _merge(comments, comments_of(text, under), under)
    lines = [
        _ABOUT.get(config_name, f"{config_name}: a configuration of gptq_plugin."),
        "",
        "Examples:",
        _EXAMPLES.get(config_name, ""),
        "",
        "Flags:",
        _FLAGS,
        "",
        "Groups, GROUP=CHOICE (* is chosen):",
        *_choices(groups, chosen),
        "",
        "Options, OPTION=VALUE with dots between names (quantizer.bits=3), and their values:",
        "",
        *_commented(tree, comments),
    ]
    return "\n".join(lines)


def comments_of(text: str, under: tuple[str, ...] = ()) -> dict[tuple[str, ...], Comments]:
    """Reads the comments of a YAML file, by the path of the option they belong to.

    Those at the top of the file belong to the whole, which is at `under`.
    """
    found: dict[tuple[str, ...], Comments] = {}
    above: list[str] = []
    open_keys: list[tuple[int, str]] = []
    first = True
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            above.append(stripped)
            continue
        match = re.match(r"( *)([\w.]+):(?=\s|$)(.*)", line)
        if match:
            indent, key = len(match[1]), match[2]
            open_keys = [one for one in open_keys if one[0] < indent] + [(indent, key)]
            behind = re.search(r"\s(#.*)$", match[3])
            if first and under:
                found[under] = Comments(tuple(above), "")
                above = []
            if above or behind:
                path = (*under, *(name for _, name in open_keys))
                found[path] = Comments(tuple(above), behind[1] if behind else "")
            first = False
        above = []
    return found


def _merge(
    comments: dict[tuple[str, ...], Comments], later: Mapping[tuple[str, ...], Comments], heading: tuple[str, ...]
) -> None:
    """Adds the comments of a file that is composed later: its heading replaces the earlier one, others are added."""
    for path, own in later.items():
        before = comments.get(path, Comments((), ""))
        if path != heading:
            new = (line for line in own.above if not any(line.rstrip(".") in earlier for earlier in before.above))
            own = Comments((*before.above, *new), own.behind or before.behind)
        comments[path] = own


def _choices(groups: Mapping[str, Sequence[str]], chosen: set[str]) -> Iterator[str]:
    rows = []
    for group, options in groups.items():
        if group in ("hydra", "run"):
            continue
        for option in options:
            mark = "*" if f"{group}/{option}" in chosen else " "
            heading = re.match(r"# (?!@)(.*?)(?:[.:](?=\s)|[.:]?$)", _conf_text(f"{group}/{option}") or "", re.M)
            rows.append((f"{mark} {group}={option}", heading[1] if heading else ""))
    width = max(len(name) for name, _ in rows)
    return (f"  {name:{width}}  {what}".rstrip() for name, what in rows)


def _commented(
    tree: Mapping[str, Any], comments: Mapping[tuple[str, ...], Comments], path: tuple[str, ...] = ()
) -> Iterator[str]:
    """The lines of a configuration as YAML, with the comments of its files."""
    pad = "  " * len(path)
    for name, value in tree.items():
        here = (*path, name)
        own = comments.get(here, Comments((), ""))
        yield from (pad + line for line in own.above)
        behind = f"  {own.behind}" if own.behind else ""
        if isinstance(value, Mapping) and value:
            yield f"{pad}{name}:{behind}"
            yield from _commented(value, comments, here)
        else:
            yield f"{pad}{name}: {_inline(value)}{behind}"
        if not path:
            yield ""


def _inline(value: Any) -> str:
    if isinstance(value, str) and value.startswith("${"):
        return value  # an interpolation needs no quotes
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]


def _conf_text(path: str) -> str | None:
    """A configuration file of this package; None if there is none of that name."""
    file = files(CONF).joinpath(f"{path}.yaml")
    return file.read_text(encoding="utf-8") if file.is_file() else None
