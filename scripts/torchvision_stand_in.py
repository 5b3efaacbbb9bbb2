"""timm and open_clip without torchvision: both import it for transforms that their models do not use.

torchvision has no build that fits the torch of this extra, so an empty stand-in takes its place while they are
imported: `with installed(): import timm`. Where a real torchvision works, it is left alone.
"""

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "torchvision"


class _Interpolation(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(types.ModuleType):
    """Any class and any function, none of which does anything."""

    __version__ = "0.0"
    __path__: list[str] = []  # noqa: RUF012  (a package: its submodules are looked for)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import torch

        if name == "InterpolationMode":
            return _Interpolation
        return type(name, (torch.nn.Module,), {}) if name[0].isupper() else lambda *args, **kwargs: None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == NAME else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


@contextmanager
def installed() -> Iterator[None]:
    """Let `import torchvision` succeed inside the block only, where timm and open_clip are imported.

    transformers and diffusers are imported before: they ask for torchvision, too, and must go on without it.
    """
    try:
        import torchvision  # noqa: F401
    except Exception:  # none, or one of another torch
        from diffusers import DiTTransformer2DModel  # noqa: F401
        from transformers import CLIPModel  # noqa: F401

        _forget()
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            _forget()
    else:
        yield


def _forget() -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[module]
