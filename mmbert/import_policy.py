"""Which classes a configuration may name: a few of Lightning's, and what the user allows on the command line."""

import importlib
import inspect
import re
import sys

from jsonargparse import set_parsing_settings

from mmbert.errors import UsageError

OPTION = "--allow-import"
FAMILIES = ("callbacks", "loggers", "profilers", "strategies", "plugins")
"""Subpackages of `lightning.pytorch` whose public classes a configuration may name."""


def close_imports(arguments: list[str]) -> list[str]:
    """Lets values name nothing but Lightning's own classes and the modules after `--allow-import`.

    A configuration from a stranger can otherwise start a process: whatever it names is imported and called. The option
    is taken from the command line only; in a configuration it is unknown.

    Args:
        arguments: The command line.

    Returns:
        The command line without `--allow-import MODULE`.

    Raises:
        UsageError: The option without a module, or with something that is no dotted name.
    """
    rest, modules = [], []
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option != OPTION:
            rest.append(argument)
            continue
        module = value if equals else next(remaining, "")
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) or module.split(".")[0] == "jsonargparse":
            raise UsageError(f"{OPTION} '{module}': expected a module such as my_fusion, found on the Python path.")
        modules.append(module)
    if modules and "" not in sys.path:
        sys.path.insert(0, "")  # the module lies where the user stands
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*lightning_classes(), *modules],
        instantiate_subclass_spec_in_any=False,
    )
    return rest


def lightning_classes() -> list[str]:
    """Dotted names of the classes that a configuration may name."""
    found = []
    for family in FAMILIES:
        package = importlib.import_module(f"lightning.pytorch.{family}")
        for name in package.__all__:
            cls = getattr(package, name)
            if inspect.isclass(cls):
                found += [f"{package.__name__}.{name}", f"{cls.__module__}.{cls.__qualname__}"]
    return sorted(set(found))
