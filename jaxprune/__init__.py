# SPDX-License-Identifier: Apache-2.0
"""jaxprune: structural pruning of JAX networks, as a program transformation.

graph = jp.trace(model.apply, variables, images)
keep = jp.select(graph, jp.score(jp.magnitude(), graph, variables), jp.flops(0.4))
variables = jp.shrink(graph, keep, variables)
apply = jp.slim(model.apply, graph, keep)

The names lie in `jaxprune.api`, which is imported when the first of them is used: the
command answers without waiting for JAX.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Functions that are named as the file that they lie in.
_FUNCTIONS = (
    "bench",
    "cost",
    "export",
    "latency",
    "prune",
    "reconstruct",
    "select",
    "slim",
    "trace",
)

if TYPE_CHECKING:
    from jaxprune.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """A submodule, or else one of the public names."""
        path, hidden = f"jaxprune.{name}", name.startswith("_")
        if not hidden and name not in _FUNCTIONS and importlib.util.find_spec(path):
            return importlib.import_module(path)
        api = importlib.import_module("jaxprune.api")
        if hasattr(api, name):
            return getattr(api, name)
        message = f"module 'jaxprune' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])

    def __dir__() -> list[str]:
        own = {name for name in globals() if name.startswith("__")}
        return sorted({*own, *__getattr__("__all__")})


class _Package(ModuleType):
    """This package. `jaxprune.trace` is the function, whoever imports the file.

    Python binds a package's attribute to the submodule when that is first imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
