"""Comparison of fusion strategies as an experiment: equal budgets, several seeds, paired tests, a report.

The package can be called: `mmbert.compare(config, ...)` is `mmbert.compare.experiment.run_comparison(config, ...)`.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Module that runs a comparison when it is called, so that `mmbert.compare` is both function and package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `run_comparison`."""
        from mmbert.compare.experiment import run_comparison  # here, as it imports torch and matplotlib

        return run_comparison(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
