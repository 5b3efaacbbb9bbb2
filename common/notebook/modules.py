"""Modules that can be called: `tinyclip_jax.train(...)` trains, and `tinyclip_jax.train.Config` is still there.

A package's verb and one of its modules may have one name. Python binds the module to this name in the package when
anything imports it, so a function of the package would be replaced.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
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


def public(package: str, name: str) -> Any:
    """What `package.name` is on first use: the module of this name, which can be called, or what `pretrained` has.

    The module even where nothing imported it before, or `package.train.Config` would depend on who imported what.
    """
    module = f"{package}.{name}"
    return import_module(module) if find_spec(module) else getattr(import_module(f"{package}.pretrained"), name)
