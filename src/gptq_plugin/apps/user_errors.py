"""Tells errors whose sentence is for users from faults of the program: `is_for_users`.

Tested by tests/apps/test_command_line.py: what the commands show of errors.
"""

from __future__ import annotations

import dis
from types import TracebackType

from gptq_plugin.errors import OF_USERS

_PACKAGE = __name__.partition(".")[0]
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_for_users(error: BaseException) -> bool:
    """Returns whether an error is of this package's kinds, of a file that is not there, or one with a sentence that a
    `raise` statement of this package raised: a refusal. What Python or a library raises is none."""
    if isinstance(error, (*OF_USERS, FileNotFoundError)):
        return True
    if not isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError)) or not error.args:
        return False
    return error.__traceback__ is not None and _is_raised_here(error.__traceback__)


def _is_raised_here(traceback: TracebackType) -> bool:
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    is_ours = str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE
    return is_ours and frame.f_code.co_code[traceback.tb_lasti] == _RAISE
