"""Modules that can be called: `tinyclip_jax.train(...)` trains, and `tinyclip_jax.train.Config` is still there.

A package's verb and one of its modules may have one name. Python binds the module to this name in the package when
anything imports it, so a function of the package would be replaced.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(module: str, function: str) -> None:
    """Makes a module call `function` ("package.module:name"), which is imported at the first call."""

    def target() -> Callable[..., Any]:
        where, _, name = function.partition(":")
        return getattr(import_module(where), name)

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return target()(*args, **kwargs)

        def __reduce__(self) -> Any:  # cloudpickle knows only plain modules
            return import_module, (module,)

        @property
        def __wrapped__(self) -> Callable[..., Any]:  # help() and completion show its signature
            return target()

    sys.modules[module].__class__ = CallableModule
