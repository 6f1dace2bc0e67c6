"""The entry of `mmbert`, `python -m mmbert` and train.py: the small commands do not wait for Lightning's import."""

import sys

from mmbert.cli.commands import COMMANDS, run_command


def main(
    arguments: list[str] | None = None, *, default: list[str] | None = None, preparation_seconds: float = 0.0
) -> None:
    """Run the command line; the arguments are those of `mmbert.cli.parser.main`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        run_command(arguments)
        return
    from mmbert.cli.parser import main as train

    train(arguments, default=default, preparation_seconds=preparation_seconds)


if __name__ == "__main__":
    main()
