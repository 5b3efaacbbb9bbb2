"""The notebooks as files: valid, without outputs, and what they name exists. scripts/run_notebooks.py runs them."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import run_notebooks

from heirloom.common import config
from tests.docs.test_commands import check, commands_in

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [file.stem for file in FILES]
OURS = ("heirloom", "tinyclip_jax", "lit_jax", "learngene", "weightgen")


def cells(name, kind):
    """The sources of the cells of a kind."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def python(source):
    """A cell without its lines for IPython; a line of its own keeps blocks from being empty."""
    return re.sub(r"^( *)[!%].*$", r"\1pass", source, flags=re.MULTILINE)


def programs(name):
    """The Python of a notebook: its code cells, and the code shown in its texts."""
    shown = re.findall(r"^```python\n(.*?)^```", "\n".join(cells(name, "markdown")), re.DOTALL | re.MULTILINE)
    return [python(source) for source in [*cells(name, "code"), *shown]]


def unknown(source):
    """Names of our packages that a program uses and that do not exist, and recipes that do not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            module = importlib.import_module(node.module)
            found += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OURS:
            if not hasattr(importlib.import_module(node.value.id), node.attr):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"(tinyclip|lit|learngene|weightgen)/\w+", node.value)
            if named and node.value not in config.recipes():
                found.append(node.value)
    return found


def test_there_is_one_for_each_method_one_for_conversion_and_one_for_own_data():
    assert NAMES == ["convert_and_verify", "learngene", "lit", "own_data", "tinyclip", "weightgen"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_no_outputs(name):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) > 8
    for cell in notebook["cells"]:
        assert all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
            wanted |= {"outputs", "execution_count"}
        assert set(cell) == wanted and cell["metadata"] == {}, cell["id"]


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_its_own_badge_and_the_shared_installation(name):
    title, code = cells(name, "markdown")[0], cells(name, "code")
    assert title.startswith("# ") and "less than five minutes on two CPU cores" in title
    address = r"\(https://colab\.research\.google\.com/github/[\w-]+/heirloom/blob/main/notebooks/(\w+)\.ipynb\)"
    assert re.findall(rf"\[!\[Open in Colab\]\(\S+\)\]{address}", title) == [name]
    assert code[0] == cells(NAMES[0], "code")[0] and "%pip install" in code[0]
    assert "plt.show()" in "".join(code) or ".plot(" in "".join(code)


@pytest.mark.parametrize("name", NAMES)
def test_its_names_and_recipes_exist(name):
    assert [wrong for program in programs(name) for wrong in unknown(program)] == []


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_are_accepted(name):
    lines = re.findall(r"^!heirloom (.*)$", "\n".join(cells(name, "code")), re.MULTILINE)
    for words in [*map(shlex.split, lines), *commands_in("\n".join(cells(name, "markdown")))]:
        check(words)


def test_what_does_not_exist_is_found():
    wrong = "from learngene import expand, shrink\ntinyclip_jax.lode('lit/digit')\ntinyclip_jax.load('lit/digits')"
    assert sorted(unknown(wrong)) == ["learngene.shrink", "lit/digit", "tinyclip_jax.lode"]
    with pytest.raises(AssertionError):
        check(["inherit", "tinyclip/emojis", "student"])


def test_a_command_that_fails_ends_a_notebook():
    source = run_notebooks.checked("x = 1\nif x:\n    !heirloom eval x\n!ls")
    assert source.splitlines()[2:4] == ["    !heirloom eval x", f"    {run_notebooks.CHECK}"]
    assert source.splitlines()[4:] == ["!ls", run_notebooks.CHECK]
