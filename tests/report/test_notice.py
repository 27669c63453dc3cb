"""A message is seen once whatever of logging is configured, and not at all if it was silenced."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest
from tqdm import tqdm

from gptq_plugin.report.notice import show, warn

Script = Callable[[], logging.Logger]


@pytest.fixture
def in_a_script() -> Iterator[Script]:
    """Gives a logger of the package as in a script that configures nothing: no handler, and the root's level WARNING.
    Called in the test, since pytest adds its handlers after fixtures."""
    root, package = logging.getLogger(), logging.getLogger("gptq_plugin")
    before = (root.handlers[:], root.level, package.handlers[:], package.level)

    def begin() -> logging.Logger:
        root.handlers, package.handlers = [], []
        root.setLevel(logging.WARNING)
        package.setLevel(logging.NOTSET)
        return logging.getLogger("gptq_plugin.some.module")

    yield begin
    root.handlers, package.handlers = before[0], before[2]
    root.setLevel(before[1])
    package.setLevel(before[3])
    logging.disable(logging.NOTSET)


def handler(level: int = logging.NOTSET) -> logging.StreamHandler[io.StringIO]:
    made = logging.StreamHandler(io.StringIO())
    made.setLevel(level)
    return made


def test_without_any_configuration_it_is_on_stderr(in_a_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    log = in_a_script()
    show(log, "two\nlines")
    assert capsys.readouterr() == ("", "two\nlines\n")


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
@pytest.mark.parametrize("name", ["", "gptq_plugin"])
def test_a_configured_logger_has_it_and_stderr_not_again(
    level: int, name: str, in_a_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    log = in_a_script()
    configured, mine = logging.getLogger(name), handler()
    configured.addHandler(mine)
    configured.setLevel(level)
    show(log, "100 %")
    assert mine.stream.getvalue() == "100 %\n" and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("case", ["root at WARNING", "handler at WARNING", "null handler"])
def test_logging_that_would_not_show_it_leaves_it_to_stderr(
    case: str, in_a_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    log = in_a_script()
    root = logging.getLogger()
    root.addHandler(logging.NullHandler() if case == "null handler" else handler(logging.WARNING))
    if case != "root at WARNING":
        root.setLevel(logging.INFO)
    else:
        root.handlers[0].setLevel(logging.NOTSET)
    show(log, "seen")
    assert capsys.readouterr().err == "seen\n"


@pytest.mark.parametrize("how", ["gptq_plugin", "gptq_plugin.some.module", "disable"])
def test_who_silences_the_package_does_not_see_it(
    how: str, in_a_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    log = in_a_script()
    if how == "disable":
        logging.disable(logging.INFO)
    else:
        logging.getLogger(how).setLevel(logging.ERROR)
    show(log, "hidden")
    log.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("", "")


def test_a_live_bar_stays_below_it(in_a_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    log = in_a_script()
    with tqdm(total=2, desc="bar", ascii=True) as bar:
        bar.update(1)
        capsys.readouterr()
        show(log, "the result")
        err = capsys.readouterr().err
    before, _, after = err.partition("the result\n")
    assert "bar" not in before and "bar" in after


@pytest.mark.parametrize("shown", [warn, show])
def test_a_message_through_a_handler_has_a_line_to_itself_while_bars_are_live(
    shown: Callable[[logging.Logger, str], None], in_a_script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    log = in_a_script()
    logging.getLogger("gptq_plugin").addHandler(logging.StreamHandler())
    logging.getLogger("gptq_plugin").setLevel(logging.INFO)
    with tqdm(desc="outer", total=3), tqdm(desc="inner", total=3) as inner:
        inner.update()
        shown(log, "a message")
        inner.update()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "a message" in line)
    assert line.replace("\x1b[A", "").rpartition("\r")[2] == "a message"  # \x1b[A: up to the outer bar's line


def test_a_warning_is_one_without_any_configuration(in_a_script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    warn(in_a_script(), "100 %")
    assert capsys.readouterr() == ("", "100 %\n")
