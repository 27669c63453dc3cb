"""``gptq-plugin``, the command for checkpoints: argparse, without Hydra, so that ``--help`` is quick.

Every subcommand has a function that adds its arguments and one that runs it; torch is imported when it runs.

Exit status: 0; 1 if a checkpoint is damaged, a `--target` would refuse it, or a command cannot do what it was asked; 2
for wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_plugin import __version__
from gptq_plugin.apps.output import output_never_fails, printable
from gptq_plugin.apps.user_errors import is_for_users
from gptq_plugin.clients.client import CLIENTS, Client, rules_of

if TYPE_CHECKING:
    from gptq_plugin.check.findings import Lint


_CHECKPOINT = "the checkpoint: a folder, or the id owner/name of a repository on the Hugging Face hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default that of the process, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="gptq-plugin",
        description="Check quantized checkpoints, convert, evaluate and upload them. gptq-finetune and gptq-quantize "
        "make them.",
    )
    parser.add_argument("--version", action="version", version=f"gptq-plugin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_check, _add_convert, _add_eval, _add_push):
        add(commands)
    with output_never_fails():
        parsed = parser.parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = parsed.run
        try:
            return run(parsed)
        except Exception as error:
            if not is_for_users(error):
                raise
            print(printable(f"{parsed.program}: {error}"), file=sys.stderr)
            return 1


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="describe a GPTQ or compressed-tensors checkpoint, its faults, and the clients that take it",
        description="Checks a GPTQ or compressed-tensors checkpoint of any tool. Exit status 1: it is damaged, or a "
        "--target would refuse it.",
    )
    parser.add_argument("directory", metavar="DIR", type=_place, help=_CHECKPOINT)
    parser.add_argument(
        "--float", metavar="DIR", dest="float_dir", help="folder or id of the float model, to compare every tensor with"
    )
    parser.add_argument(
        "--target",
        metavar="CLIENT",
        action="append",
        choices=CLIENTS,
        help=f"a client that must take it: {', '.join(CLIENTS)}; may be given several times",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        type=_positive,
        default=1,
        help="GPUs that share each layer (vllm, sglang)",
    )
    _add_hub(parser)
    parser.set_defaults(run=_check, program=parser.prog)


def _check(parsed: argparse.Namespace) -> int:
    from gptq_plugin.check.lint import lint

    def target(client: str) -> Client:
        return Client(client, parsed.tensor_parallel_size if rules_of(client).tensor_parallel else 1)

    targets = [target(client) for client in CLIENTS]
    found = lint(parsed.directory, parsed.float_dir, targets, revision=parsed.revision, token=parsed.token)
    _print(parsed.directory, found)
    refused = [client for client in parsed.target or () if found.refusals.get(target(client))]
    return int(bool(found.errors or refused))


def _print(directory: str, found: Lint) -> None:
    print(printable(directory))
    for heading, fact in found.facts.items():
        print(printable(f"  {heading + ':':12} {' '.join(fact.splitlines())}"))
    for finding in found.findings:
        print(printable(f"{finding.level}: {finding.message}"))
    for target, refusals in found.refusals.items():
        print(f"{target}: {'refuses it' if refusals else 'takes it'}")
        for line in refusals or found.conditions[target]:
            print(printable(f"  - {line}"))
    warnings = sum(finding.level == "warning" for finding in found.findings)
    print(f"{_count(len(found.errors), 'error')}, {_count(warnings, 'warning')}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another format, bit for bit",
        description="Writes a GPTQ or compressed-tensors checkpoint of any tool in another format: the same codes, "
        "scales, zeros and groups.",
    )
    parser.add_argument("directory", metavar="DIR", type=_place, help=_CHECKPOINT)
    parser.add_argument("out", metavar="OUT", type=_place, help="folder to write")
    parser.add_argument(
        "checkpoint_format",
        metavar="checkpoint_format=FORMAT",
        type=_checkpoint_format,
        help="gptq, gptq_v2 or compressed-tensors",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT")
    _add_hub(parser)
    parser.set_defaults(run=_convert, program=parser.prog)


def _convert(parsed: argparse.Namespace) -> int:
    from gptq_plugin.export.convert import convert

    folder = convert(
        parsed.directory,
        parsed.out,
        parsed.checkpoint_format,
        overwrite=parsed.overwrite,
        revision=parsed.revision,
        token=parsed.token,
    )
    print(f"{folder} has checkpoint_format={parsed.checkpoint_format}")
    return 0


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="run benchmarks on an export through lm-eval, and write their results into it",
        description="Runs tasks of the lm-evaluation-harness on an export, and on its float model if that is given. "
        "The results are written into the export's report, page, card and quantize_config.json; those of a --limit are "
        "only shown.",
    )
    parser.add_argument("directory", metavar="DIR", type=_place, help="folder of the export")
    parser.add_argument("--tasks", metavar="NAME,NAME", type=_names, required=True, help="tasks or groups of lm-eval")
    parser.add_argument("--float", metavar="DIR", dest="float_dir", help="folder or id of the float model, to compare")
    parser.add_argument("--include-path", metavar="DIR", help="folder with more tasks, as YAML")
    parser.add_argument(
        "--num-fewshot", metavar="N", type=int, help="examples before each sample (default: the task's)"
    )
    parser.add_argument("--limit", metavar="N", type=_positive, help="samples of each task at most, for a trial")
    parser.add_argument("--batch-size", metavar="N", type=_positive, default=1, help="samples in one forward")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--apply-chat-template", action="store_true", help="write requests as the tokenizer's chats")
    parser.set_defaults(run=_eval, program=parser.prog)


def _eval(parsed: argparse.Namespace) -> int:
    from gptq_plugin.apps.benchmarks import Request, run_benchmarks, shown_results
    from gptq_plugin.checkpoint.checkpoint import Checkpoint
    from gptq_plugin.export.benchmark_results import check_results, write_results

    request = Request(
        parsed.tasks,
        parsed.include_path,
        parsed.num_fewshot,
        parsed.limit,
        parsed.batch_size,
        parsed.device,
        parsed.apply_chat_template,
    )
    folder = Path(parsed.directory)
    try:
        Checkpoint.open(folder)
        if request.limit is None:
            check_results(folder)
        results = run_benchmarks(folder, parsed.float_dir, request)
        print(printable("\n".join(shown_results(results))))
        if request.limit is None:
            write_results(folder, results)
            print(printable(f"written into {folder}: report, page, card and quantize_config.json"))
        else:
            print(f"of {request.limit} samples at most, so nothing is written")
    except (OSError, ValueError) as error:  # of lm-eval's, about its tasks
        print(printable(f"gptq-plugin eval: {error}"), file=sys.stderr)
        return 1
    return 0


def _add_push(commands: Any) -> None:
    parser = commands.add_parser(
        "push",
        help="upload an export to the Hugging Face hub, in one commit",
        description="Uploads an export of this package to the Hugging Face hub, in one commit: weights, descriptions, "
        "tokenizer, report and card. The repository is made, private, if it is not there.",
    )
    parser.add_argument("directory", metavar="DIR", type=_place, help="folder of the export")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="the repository")
    parser.add_argument("--public", action="store_true", help="publish it; else a public repository is refused")
    _add_hub(parser, "branch to commit to")
    parser.set_defaults(run=_push, program=parser.prog)


def _push(parsed: argparse.Namespace) -> int:
    from gptq_plugin.export.upload import Repository

    repository = Repository(parsed.repo_id, not parsed.public, parsed.revision)
    address = repository.push(parsed.directory, parsed.token)
    print(printable(f"{parsed.directory} is at {address}"))
    return 0


def _add_hub(parser: argparse.ArgumentParser, revision: str = "branch, tag or commit of the repository") -> None:
    parser.add_argument("--revision", metavar="NAME", help=revision)
    parser.add_argument(
        "--token", metavar="TOKEN", help="for a private or gated repository; else the one of `hf auth login`"
    )


def _checkpoint_format(text: str) -> str:
    name, _, value = text.partition("=")
    if name != "checkpoint_format" or not value:
        raise argparse.ArgumentTypeError(f"write checkpoint_format=FORMAT, got {text!r}")
    return value


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return names


def _place(text: str) -> str:
    if not text:  # a shell's variable that is not set; it would be the working folder
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


if __name__ == "__main__":
    sys.exit(main())
