"""The two kinds of error a user can cause, with messages that say where and what to do about it."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """An option or argument has a wrong value; the command line prints the message and exits with 2."""


class DataError(ValueError):
    """Something is wrong with a file the user gave; the command line prints the message and exits with 1.

    All arguments go to `args`, and one alone is accepted, so that the type survives pickling and the way
    `torch.utils.data.DataLoader` re-raises the errors of its workers.

    Args:
        place: where it is, "FILE:RECORD"; RECORD is a JSON path or a line number.
        found: what was found there.
        expected: what should have been there, and the fix where one is known.
        others: one line for each further problem, listed below the first.
    """

    def __init__(self, place: str, found: str = "", expected: str = "", others: tuple[str, ...] = ()) -> None:
        super().__init__(place, found, expected, others)
        self.place = place
        self.found = found
        self.expected = expected
        self.others = others

    def __str__(self) -> str:
        return "\n".join([describe(self.place, self.found, self.expected), *self.others])


class NotFiniteError(DataError):
    """The loss or its gradient is no number any more; the run stops before the optimizer takes the step.

    Args:
        place: the step.
        found: what is not finite.
        facts: what the step saw: losses, learning rates, gradient norms, samples.
    """

    def __init__(self, place: str, found: str = "", facts: dict[str, object] | None = None) -> None:
        super().__init__(place, found, "a finite loss: lower optim.lr, or look at the samples of the step")
        self.facts = facts or {}


def describe(place: str, found: str, expected: str) -> str:
    """The one line a problem is shown as: "FILE:RECORD: found; expected ..."."""
    if not found:
        return place
    return f"{printable(place)}: {found}" + (f"; expected {expected}" if expected else "")


def printable(text: str) -> str:
    """`text` with line breaks, control characters and lone surrogates escaped, safe for any terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def quote(value: object, limit: int = 60) -> str:
    """`value` as it is shown in a message: its repr, cut after `limit` characters."""
    # Cut before repr: the value may be a string of many megabytes.
    text = repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the allowed name closest to `name`, or "" if none is close."""
    matches = difflib.get_close_matches(name, list(allowed))
    matches.sort(key=lambda match: sorted(match) != sorted(name))  # two letters in the wrong order come first
    return f" Did you mean {matches[0]!r}?" if matches else ""
