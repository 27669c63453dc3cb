"""Command lines and YAML for the Hydra commands: overrides, groups, and configurations of a user's own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign, Case, Refused, names
from campaigns.examples import examples
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from omegaconf import OmegaConf

_KEYS = (
    "quantizer.bits", "quantizer.group_size", "quantizer.sym", "quantizer.damp_percent", "quantizer.clip_ratios",
    "quantizer.dynamic", "quantizer.modules_to_not_convert", "quantizer.nsamples", "quantizer.batch_size",
    "quantizer.token_weighting", "quantizer.checkpoint_format", "quantizer.offload_weights", "quantizer.exact_sums",
    "quantizer.model_seqlen", "quantizer.seed", "quantizer._target_", "quantizer.bitz", "quantizer", "data", "model",
    "data.seq_len", "data.batch_size", "data.seed", "data.shuffle", "model.hidden_size", "model.num_hidden_layers",
    "model.vocab_size", "model.name_or_path", "model.lr", "model.dtype", "trainer.max_steps", "trainer.accelerator",
    "trainer.devices", "trainer.precision", "trainer.max_epochs", "trainer.callbacks", "callbacks.gptq.export_dir",
    "callbacks.gptq.target", "callbacks.gptq.weights", "callbacks.gptq.max_degradation", "callbacks.gptq.on_fail",
    "callbacks.gptq.mix_fraction", "callbacks.gptq.calibration", "callbacks.gptq", "callbacks", "seed", "save_float",
    "evaluate", "eval_batch_size", "export_dir", "overwrite", "target", "device", "ckpt", "adapter", "trainer", "run",
    "hydra.run.dir", "nothing", "quantizer.bits.x", "a.b.c", "quantizer@x", "data.path",
)  # fmt: skip
_VALUES = (
    "3", "4", "8", "0", "-1", "2.5", "1e400", "nan", "inf", "true", "null", "", "''", "'4'", "text", "w3g128", "hf",
    "text", "builtin", "hub", "small_llama", "[1", "[1,2]", "[]", "{}", "{a:b}", "{.*:{bits:8}}", r"{-\:.*:{}}",
    "${seed}",
    "${nothing}", "${oc.env:HOME}", "${oc.env:NOTHING_OF_THIS_NAME}", "${quantizer}", "???", "'", "\\", "é", "\u2028",
    "x" * 900, "99999999999999999999", "0x10", "1_000", "choice(1,2)", "range(0,3)", "glob(*)", "1,2", "a=b", "a b",
    "/etc/passwd", "/nowhere", "../x", "~", "vllm", "cpu", "cuda", "meta", "gptq_plugin.nothing", "os.getcwd", "int",
    "{_target_:os.getcwd}", "{_target_:gptq_plugin.QuantizeConfig}", "[1.0,0.9]", "labels", "gptq_v2", "best", "auto",
)  # fmt: skip
_SIGNS = ("", "", "", "", "+", "++", "~")
_FLAGS = (
    "--cfg=job",
    "--info",
    "--nothing",
    "-m",
    "--config-name=nothing",
    "--config-name=quantize",
    "--version",
    "--help",
)


def _lines() -> SearchStrategy[tuple[str, list[str], str | None]]:
    """The command, its arguments, the YAML of a configuration of the user's own or None."""
    one = st.tuples(st.sampled_from(_SIGNS), st.sampled_from(_KEYS), st.sampled_from(_VALUES))
    option = one.map(lambda parts: f"{parts[0]}{parts[1]}" + ("" if parts[0] == "~" else f"={parts[2]}"))
    line = st.lists(option, min_size=1, max_size=3)
    with_flags = st.tuples(line, st.sampled_from(_FLAGS)).map(lambda both: [*both[0], both[1]])
    own = st.none() | st.lists(st.tuples(st.sampled_from(_KEYS), st.sampled_from(_YAML)), max_size=3).map(_tree)
    command = st.sampled_from(["finetune", "quantize"])
    return st.tuples(command, st.one_of(line, line, line, with_flags), own)


_YAML = (
    "3", "4.0", "yes", "no", "null", "~", "[1", "{a: b}", "{a: b",
    "!!python/object/apply:os.system [mkdir mark]",
    "'4'", "0b100", "0o4", "1e3", "1:30", "2026-01-02", "|\n  text", "? x", "- 1", "\t3", "!!binary aGk=", "!!set {x}",
    "<<: *x", "${seed}", "${nothing}", "w3g128", "é", "'\\0'", '"\\0"', "*x", "%x", "@x", "`", "3 # comment",
)  # fmt: skip


def _tree(pairs: list[tuple[str, str]]) -> str:
    """YAML with these keys, after the commands' own configuration."""
    lines = ["defaults:", "  - finetune", "  - _self_"]
    for key, value in pairs:
        parts = key.split(".")
        lines += ["  " * depth + f"{part}:" for depth, part in enumerate(parts[:-1])]
        lines.append("  " * (len(parts) - 1) + f"{parts[-1]}: {value}")
    return "\n".join([*lines, ""])


_DOUBLED = "".join(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(1, 40))


def yaml_texts() -> SearchStrategy[tuple[str, str]]:
    """("yaml", text for `QuantizeConfig.from_yaml`)."""
    keys = st.sampled_from(
        ["bits", "group_size", "sym", "dynamic", "clip_ratios", "modules_to_not_convert", "x", "damp_percent", "seed"]
    )
    line = st.tuples(keys, st.sampled_from(_YAML) | st.sampled_from(_VALUES)).map(": ".join)
    whole = st.sampled_from(
        [
            "", "3", "[]", "- bits: 4", "bits: 4\nbits: 8", "bits: {bits: 4}", "\x00", "bits:\t4", "--- {}\n--- {}",
            f"x0: &x0 [1]\n{_DOUBLED}bits: *x39", "bits: &b\n  - *b", "[" * 3000, "{bits: " * 200, "? {bits: 4}",
            "dynamic: {a: &a {bits: 8}, b: *a}", "!!python/name:os.system", "1: 2", "null: 3", "bits: !!int '4'",
        ]
    )  # fmt: skip
    lines = st.lists(line, min_size=1, max_size=3).map("\n".join)
    return st.tuples(st.just("yaml"), lines | whole)


class _Works(Exception):
    """Training or quantization began."""


def _prepare(folder: Path) -> None:
    """Imports the commands, and has them stop where work would begin; makes a model for ``gptq-quantize``."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from lightning import Trainer

    from gptq_plugin.apps import language_model
    from gptq_plugin.quantize.module import QuantizeModule

    def begin(*given: Any, **named: Any) -> None:
        raise _Works

    module = language_model.small_llama(["some words"] * 9, vocab_size=300, hidden_size=32, num_hidden_layers=1)
    module.network.save_pretrained(folder / "model")
    module.tokenizer.save_pretrained(folder / "model")
    _model.append(f"model.name_or_path={folder / 'model'}")
    _starts.update({(Trainer, "_run_stage"): begin, (QuantizeModule, "temporarily"): begin})


_model: list[str] = []
_starts: dict[tuple[type, str], Callable[..., None]] = {}


def attack_yaml(case: Case, text: str) -> None:
    from gptq_plugin import QuantizeConfig

    case.is_of(f"YAML {text[:80]!r}")
    words = [line.partition(":")[0].strip("- {") for line in text.splitlines()] or ["YAML"]
    named = names("YAML", "configuration", "unknown option", *filter(None, words))
    case.attempt("from_yaml", lambda: QuantizeConfig.from_yaml(text), named)


def _attack(case: Case, given: tuple[str, list[str], str | None]) -> None:
    """Runs a command in this process until its work would begin."""
    from gptq_plugin.apps import cli

    command, arguments, own = given
    case.is_of(f"gptq-{command} {' '.join(arguments)[:200]!r} {own and own[:200]!r}")
    if own is not None:
        Path("conf").mkdir()
        Path("conf/own.yaml").write_text(own.replace("- finetune", f"- {command}"))
        arguments = [*arguments, f"--config-dir={Path('conf').resolve()}", "--config-name=own"]
    for (kind, name), begin in _starts.items():
        setattr(kind, name, begin)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    is_named = any("name_or_path" in one or one.startswith("model=") for one in arguments)
    sys.argv = [f"gptq-{command}", *([] if is_named or command == "finetune" else _model), *arguments]

    def run() -> None:
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                getattr(cli, command)()
        except _Works:
            return
        except SystemExit as end:
            if end.code:
                raise Refused(told.getvalue()) from end
        except Exception as error:
            if _is_hydras(error):
                raise Refused(
                    f"{error} {error.__cause__ or ''} {error.__context__ or ''} {getattr(error, 'full_key', '')}"
                ) from error
            raise

    case.attempt(f"gptq-{command}", run, names(*_words(arguments, own)))


def _is_hydras(error: Exception) -> bool:
    """True for errors of Hydra and of what it reads with, unless something unrelated is inside."""
    module = type(error).__module__.partition(".")[0]
    cause = error.__cause__
    inside = (
        module == "hydra"
        and cause is not None
        and type(cause) in (AttributeError, KeyError, IndexError, RecursionError)
    )
    return module in ("hydra", "omegaconf", "yaml") and not inside


def _words(arguments: list[str], own: str | None) -> list[str]:
    """What a refusal may name: keys and their last parts, values, groups and lines of the configuration."""
    words = {"own.yaml", "own"} if own is not None else set()
    keys = [one.lstrip("+~").partition("=")[0] for one in arguments]
    if own is not None:
        keys += _flat(own)
    for key in keys:
        words |= {key, key.rpartition(".")[2], key.partition("@")[0], key.lstrip("-")}
    words |= {value for one in arguments if (value := one.partition("=")[2])}
    words |= {word[2:-1] for word in words if word.startswith("${")}
    return sorted(word for word in words if word)


def _flat(text: str) -> list[str]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except Exception:  # noqa: BLE001  it may be no YAML
        return [line.partition(":")[0].strip() for line in text.splitlines()]
    found: list[str] = []

    def walk(tree: Any, inside: str) -> None:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            found.append(f"{inside}{key}")
            walk(value, f"{inside}{key}.")

    walk(content, "")
    return found


CAMPAIGN = Campaign(
    about="command lines of gptq-finetune and gptq-quantize, up to where work begins",
    cases=600,
    few=10,
    given=lambda seed, count: examples([_lines()], seed, count),
    attack=_attack,
    prepare=_prepare,
)
