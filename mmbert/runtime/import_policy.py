"""Import policy of configurations: they may name classes of Lightning, and modules after `--allow-import`."""

import importlib
import inspect
import sys

from mmbert.runtime.allowed_imports import allow_import, allowed_imports

OPTION = "--allow-import"
FAMILIES = ("callbacks", "loggers", "profilers", "strategies", "plugins")
"""Subpackages of `lightning.pytorch` whose public classes a configuration may name."""


def restrict_imports(arguments: list[str], *, lightning: bool = True) -> list[str]:
    """Restrict what option values may import to Lightning's own classes and the modules after `--allow-import`.

    A configuration from a stranger can otherwise start a process: whatever it names is imported and called. The option
    is taken from the command line only; in a configuration it is unknown.

    Args:
        arguments: The command line.
        lightning: Allow Lightning's classes, which imports it; without it only the user's own modules are allowed.

    Returns:
        The command line without `--allow-import MODULE`.

    Raises:
        UsageError: The option without a module, or with a value that is not a dotted name.
    """
    from jsonargparse import set_parsing_settings  # slow to import, and commands without a configuration need none

    rest = []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option != OPTION:
            rest.append(argument)
            continue
        allow_import_from_cwd(value if equals else next(remaining, ""))
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*(lightning_classes() if lightning else []), *allowed_imports()],
        instantiate_subclass_spec_in_any=False,
    )
    return rest


def allow_import_from_cwd(module: str) -> None:
    """Allow a module in the working directory, or anywhere on the Python path.

    Raises:
        UsageError: A value that is not a dotted name.
    """
    allow_import(module)
    if "" not in sys.path:
        sys.path.insert(0, "")


def lightning_classes() -> list[str]:
    """List the dotted names of the Lightning classes that a configuration may name."""
    found = []
    for family in FAMILIES:
        package = importlib.import_module(f"lightning.pytorch.{family}")
        for name in package.__all__:
            cls = getattr(package, name)
            if inspect.isclass(cls):
                found += [f"{package.__name__}.{name}", f"{cls.__module__}.{cls.__qualname__}"]
    return sorted(set(found))
