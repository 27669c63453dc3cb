"""Messages that users see without configuring logging, above live progress bars: `show`, `warn`."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


def show(log: logging.Logger, text: str) -> None:
    """Logs a text at INFO, or, where no handler would show it, writes it to stderr, above live progress bars.

    Lightning and transformers give only their own loggers a handler, and Python shows warnings alone by default. A
    level above INFO, set for the package's loggers or by `logging.disable`, silences it.
    """
    if log.isEnabledFor(logging.INFO) and _has_handler(log):
        with tqdm.external_write_mode(file=sys.stderr):
            log.info("%s", text)
    elif not _is_silenced(log):
        tqdm.write(text, file=sys.stderr)


def warn(log: logging.Logger, text: str) -> None:
    """Logs a text as a warning."""
    with tqdm.external_write_mode(file=sys.stderr):
        log.warning("%s", text)


def _has_handler(log: logging.Logger) -> bool:
    logger: logging.Logger | None = log
    while logger is not None:
        if any(handler.level <= logging.INFO for handler in logger.handlers if not _is_null(handler)):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _is_null(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.NullHandler)


def _is_silenced(log: logging.Logger) -> bool:
    """True if somebody set a level above INFO for the logger or a parent; the root's is WARNING by default."""
    logger: logging.Logger | None = log
    while logger is not None and logger is not logging.root:
        if logger.level:
            return logger.level > logging.INFO
        logger = logger.parent
    return logging.root.manager.disable >= logging.INFO
