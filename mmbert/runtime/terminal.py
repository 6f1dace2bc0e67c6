"""What a user reads on the terminal: our own log lines, and one sentence for each user error."""

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from mmbert.errors import DataError, UsageError

NOISE = (  # warnings of Lightning about what is intended here
    "does not have many workers",
    "exists and is not empty",
    "isinstance.treespec",
    "not supported by the model summary",
    "in eval mode at the start of training",
    "smaller than the logging interval",
    "could not find the monitored key",
    "The dirpath has changed",
    "callbacks used to create the checkpoint need to be provided",
    "when logging on epoch level in distributed setting",
    "LightningCLI's args parameter is intended to run from within Python",
)

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def set_up_logging() -> None:
    """Log mmbert's messages to stderr, and of other libraries only warnings."""
    logging.basicConfig(format="mmbert: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("mmbert").setLevel(logging.INFO if is_first_process() else logging.WARNING)
    quiet_lightning()


def is_first_process() -> bool:
    """Whether torchrun gave this process rank 0, or did not start it; true before there is a process group."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def quiet_lightning() -> None:
    """Hide Lightning's info lines and the warnings in `NOISE`; call it again after importing it, which sets levels."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


class StderrHandler(logging.Handler):
    """Log handler that prints messages to the current stderr, without a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        print(self.format(record), file=sys.stderr)


def print_messages_of(name: str) -> None:
    """Print the messages of one logger of a library to stderr, once, whatever handlers and levels are above it."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [StderrHandler()], False
    logger.setLevel(logging.INFO)


def escape_unprintable(stream: object) -> None:
    """Let a stream of another encoding than UTF-8 print any character, escaped where it has none, as stderr does."""
    if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
        stream.reconfigure(errors="backslashreplace")


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print user errors as one sentence without traceback: exit code 2 for options, 1 for files."""
    try:
        try:
            yield
        finally:
            stdout: TextIO | None = sys.stdout  # None where the shell closed it
            if stdout is not None:
                stdout.flush()  # a closed pipe is an error here, not at exit, where Python prints a traceback
    except (UsageError, DataError) as error:
        text = str(error)
        if "Original Traceback" in text:  # a loader's process wraps its error
            text = text.strip().splitlines()[-1].split(": ", 1)[-1]
        print(f"mmbert: error: {text}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except BrokenPipeError:  # whoever read the output, `head`, has enough; Python would try to flush once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"mmbert: error: {place}{error.strerror}; make room, then resume a run with --resume auto", file=sys.stderr
        )
        raise SystemExit(1) from None
