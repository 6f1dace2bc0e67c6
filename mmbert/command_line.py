"""What the parser says when an option is wrong: one sentence with what could have been meant."""

import re
from collections.abc import Sequence

from mmbert.errors import did_you_mean


def explain(message: str, options: Sequence[str], subcommands: Sequence[str] = ()) -> str:
    """Turns jsonargparse's message into one sentence, with a suggestion where a name is misspelt.

    Args:
        message: What the parser says, maybe over several lines.
        options: The options it knows, like "model.fusion".
        subcommands: The subcommands it knows.
    """
    message = " ".join(line.strip() for line in message.strip().splitlines())
    unknown = re.search(r"unrecognized arguments: (--?([\w.]+))", message)
    if unknown:
        return f"there is no option {unknown.group(1)}.{did_you_mean(unknown.group(2), options)}"
    choice = re.search(r"invalid choice: '([\w.-]+)'", message)
    if choice and subcommands:
        near = did_you_mean(choice.group(1), subcommands)
        return f"there is no subcommand '{choice.group(1)}'; allowed are {', '.join(subcommands)}.{near}"
    nested = re.search(r"does not accept option '([\w.]+)'", message)
    if nested:
        return f"there is no option {nested.group(1)}.{did_you_mean(nested.group(1), options)}"
    typed = re.search(r"Parser key \"([\w.]+)\": (.*)", message)
    if typed:
        said = re.sub(r"<class '([\w.]+)'>", r"\1", typed.group(2))
        return f"{typed.group(1)}: {said[:1].lower()}{said[1:]}"
    return message
