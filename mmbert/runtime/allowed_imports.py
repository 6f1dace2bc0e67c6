"""User modules that configurations and saved models may import; importing runs code, so each must be allowed."""

import importlib
import re
from typing import Any

from mmbert.errors import UsageError, did_you_mean, quote

_ALLOWED: list[str] = []
"""Modules that the user allowed in this process, on the command line or in Python; never read from a file."""

DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def allow_import(*modules: str) -> None:
    """Allow configurations and saved models to import classes of these modules, in this process.

    Args:
        modules: Dotted names, as in `import my_fusion`; a package allows all of its modules.

    Raises:
        UsageError: A value that is not a dotted name.
    """
    for module in modules:
        # jsonargparse holds the import policy itself.
        if not DOTTED_NAME.fullmatch(module) or module.split(".")[0] == "jsonargparse":
            raise UsageError(
                f"--allow-import '{module}': expected a module such as my_fusion, found on the Python path."
            )
        if module not in _ALLOWED:
            _ALLOWED.append(module)


def allowed_imports() -> list[str]:
    """Return the modules that the user allowed."""
    return [*_ALLOWED]


def import_user_class(name: str, base: type, *, key: str) -> Any:
    """Import a class of a user module.

    Args:
        name: "module.Class".
        base: Required base class.
        key: Option that names the class, for messages.

    Raises:
        UsageError: The module is not allowed (it is not imported then) or not found, or has no such class.
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
            raise  # the module exists, and one of its own imports is missing
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
