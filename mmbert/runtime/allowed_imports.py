"""Modules of the user's own: importing runs code, so none is imported because a file names it."""

import importlib
import re
from typing import Any

from mmbert.errors import UsageError, did_you_mean, quote

_ALLOWED: list[str] = []
"""What the user allowed in this process, by hand; nothing read from a file gets here."""

DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def allow_import(*modules: str) -> None:
    """Lets configurations and saved models name classes of these modules, for as long as the process lives.

    Args:
        modules: Dotted names, as in `import my_fusion`; one of a package allows what is in it.

    Raises:
        UsageError: Something that is no dotted name.
    """
    for module in modules:
        if not DOTTED.fullmatch(module) or module.split(".")[0] == "jsonargparse":  # it holds the policy of the YAMLs
            raise UsageError(
                f"--allow-import '{module}': expected a module such as my_fusion, found on the Python path."
            )
        if module not in _ALLOWED:
            _ALLOWED.append(module)


def allowed_imports() -> list[str]:
    """The modules that the user allowed."""
    return [*_ALLOWED]


def own_class(name: str, base: type, *, key: str) -> Any:
    """A class of the user's own.

    Args:
        name: "module.Class".
        base: What it must be a subclass of.
        key: The option that names it, for messages.

    Raises:
        UsageError: The module is not allowed or not there, or holds no such class; nothing is imported in the first
            case.
    """
    module_name, _, class_name = name.rpartition(".")
    if not any(module_name == allowed or module_name.startswith(f"{allowed}.") for allowed in _ALLOWED):
        raise UsageError(
            f"{key}='{name}' is a class outside of mmbert, and naming it runs its code; if you trust it, allow it: "
            f"--allow-import {module_name} on the command line, allow_import=['{module_name}'] in mmbert.load, or "
            f"mmbert.allow_import('{module_name}')."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise  # the module is there and lacks something itself
        raise UsageError(
            f"{key}='{name}': there is no module '{error.name}' on the Python path; go to its folder or set PYTHONPATH."
        ) from None
    found = getattr(module, class_name, None)
    fitting = [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, base) and x is not base]
    if class_name not in fitting:
        what = f"{module_name} has no '{class_name}'" if found is None else f"it is {quote(found)}"
        others = f", of which {module_name} has {', '.join(fitting) or 'none'}"
        raise UsageError(
            f"{key}='{name}': {what}; expected a subclass of mmbert.{base.__name__}{others}."
            f"{did_you_mean(class_name, fitting)}"
        )
    return found
