"""The command lines of the Hydra commands, before Hydra reads them: versions, help, and names that do not exist."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import CompactHydraException, InstantiationException
from omegaconf import DictConfig

from gptq_plugin import __version__
from gptq_plugin.apps.composition import composition_problems
from gptq_plugin.apps.option_names import CONF, unknown_names, unreadable_overrides
from gptq_plugin.apps.output import output_never_fails
from gptq_plugin.apps.user_errors import is_for_users

Task = Callable[[DictConfig], Any]
_COMMANDS = ("run", "multirun", "cfg", "info", "shell_completion")  # flags of Hydra's, of which a line has one


def hydra_command(config_name: str) -> Callable[[Task], Callable[..., Any]]:
    """Makes a function of a configuration a command, ``gptq-CONFIG_NAME``, as `hydra.main` does.

    ``--version`` prints the package's version, ``--help`` the options with the comments of ``conf/``. A name that does
    not exist ends the process with status 2 and the nearest one that does; an error of this package's with status 1 and
    its sentence alone, unless the environment has Hydra's ``HYDRA_FULL_ERROR=1``.
    """

    def decorate(task: Task) -> Callable[..., Any]:
        main = hydra.main(version_base="1.3", config_path=f"pkg://{CONF}", config_name=config_name)
        run = main(_with_errors_alone(task, f"gptq-{config_name}"))

        @functools.wraps(task)
        def command(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            with output_never_fails():
                _before_hydra(config_name)
                return run()

        return command

    return decorate


def _with_errors_alone(task: Task, program: str) -> Task:
    """Raises errors whose sentence is for users as the kind that Hydra shows without a traceback, and so those of files
    and values that an object of the configuration raises. What else is raised is a fault of the program, or of code
    that it calls."""

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except InstantiationException as error:
            cause = error.__cause__
            if cause is None or not (isinstance(cause, OSError | ValueError) or is_for_users(cause)):
                raise
            raise CompactHydraException(f"{program}: {cause}") from cause
        except Exception as error:
            if not is_for_users(error):
                raise
            raise CompactHydraException(f"{program}: {error}") from error

    return run


def _before_hydra(default: str) -> None:
    """Answers ``--version`` and ``--help``, and refuses unknown flags and names, and what makes no configuration. The
    names in configurations of the user's own (``--config-dir``, ``--config-path``, ``hydra.searchpath``) are left to
    Hydra."""
    if "--version" in sys.argv[1:]:
        print(f"gptq-{default} {__version__}")
        sys.exit(0)
    given, unknown = get_args_parser().parse_known_args()
    name = given.config_name or default
    program = f"gptq-{default}"
    if unknown:
        _fail(program, [f"there is no flag {unknown[0]}: options are written name=value, such as quantizer.bits=3"])
    commands = [flag for flag in _COMMANDS if getattr(given, flag)]
    if len(commands) > 1 or (given.resolve and not given.cfg):
        _fail(program, [f"give one of {', '.join(f'--{flag}' for flag in _COMMANDS)}; --resolve belongs to --cfg"])
    unreadable = unreadable_overrides(given.overrides)
    if unreadable:
        _fail(program, unreadable)
    is_own = given.config_path or given.config_dir or any("hydra.searchpath" in one for one in given.overrides)
    wrong = [] if is_own else unknown_names(name, given.overrides)
    wrong = wrong or composition_problems(given, name, f"pkg://{CONF}")
    if wrong:
        _fail(program, wrong)
    if given.help and not is_own:
        from gptq_plugin.apps.help_text import help_text

        print(help_text(name, given.overrides))
        sys.exit(0)


def _fail(program: str, sentences: list[str]) -> None:
    for sentence in sentences:
        print(f"{program}: {sentence}", file=sys.stderr)
    print(f"`{program} --help` lists all options", file=sys.stderr)
    sys.exit(2)
