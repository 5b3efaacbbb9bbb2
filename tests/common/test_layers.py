"""The packages of `common` import only those below them, and none of the four methods."""

import ast
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "common"
LAYERS = ("surgery", "nn", "checkpoint", "vit", "data", "evaluate", "train", "report", "notebook")
METHODS = ("tinyclip_jax", "lit_jax", "learngene", "weightgen")


def imported(file):
    """What a module imports when it is imported."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_what_is_below_it(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for file in (COMMON / layer).rglob("*.py"):
        for name in imported(file):
            parts = name.split(".")
            assert parts[:2] != ["heirloom", "common"] or not set(parts[2:3]) & set(above), f"{file} imports {name}"
            assert parts[0] not in METHODS, f"{file} imports {name}"


def test_every_package_of_common_has_a_layer():
    packages = {path.parent.name for path in COMMON.glob("*/*.py")}
    assert packages == set(LAYERS)
