"""What objects show of themselves in a terminal and in a notebook, and modules that can be called."""

import inspect
import pickle
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest

import learngene.expand
import tinyclip_jax
import tinyclip_jax.train
import weightgen.train
from heirloom.common.errors import InputError, Stopped, VerificationError
from heirloom.common.notebook.shown import Shown, figure_of, short


class Example(Shown):
    def __init__(self, title, facts):
        self._both = title, facts

    def _facts(self):
        return self._both


def test_a_repr_has_six_lines_of_a_hundred_characters_at_most():
    shown = repr(Example("a title", {f"fact {i}": "word " * 40 for i in range(9)})).splitlines()
    assert len(shown) == 6 and max(map(len, shown)) <= 100
    assert shown[0] == "a title" and shown[1].startswith("  fact 0: word word") and shown[1].endswith(" ...")


def test_a_notebook_gets_a_table_with_everything_escaped():
    html = Example("<b>", {"a & b": "<script>"})._repr_html_()
    assert html.startswith("<b>&lt;b&gt;</b><table>") and "<td>a &amp; b</td>" in html and "&lt;script&gt;" in html


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (1234, "1.23 k"), (3_406_977, "3.41 M"), (6.3e9, "6.3 G")])
def test_counts_have_three_digits(number, text):
    assert short(number) == text


def test_cells_without_a_curve_stay_empty():
    figure = figure_of({str(i): (np.arange(3), np.arange(3)) for i in range(4)})
    assert [axes.get_visible() for axes in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("kind", [InputError, VerificationError, Stopped])
def test_a_notebook_shows_an_error_of_the_user_in_one_line(kind):
    assert kind("steps is 0: choose 1 or more")._render_traceback_() == [
        f"{kind.__name__}: steps is 0: choose 1 or more"
    ]


def test_a_module_with_the_name_of_a_verb_can_be_called_and_is_still_a_module():
    for module, verb in ((tinyclip_jax.train, "recipe"), (learngene.expand, "gene"), (weightgen.train, "recipe")):
        assert next(iter(inspect.signature(module).parameters)) == verb
        assert inspect.ismodule(module) and sys.modules[module.__name__] is module
    assert tinyclip_jax.train.Config.__module__ == "tinyclip_jax.config"
    assert learngene.expand.layer_map(4, 3) == [0, 0, 1, 2]
    with pytest.raises(InputError, match="no recipe 'tinyclip/emojis'; did you mean 'tinyclip/emoji'"):
        tinyclip_jax.train("tinyclip/emojis")


WHATEVER_WAS_IMPORTED = """
import learngene, lit_jax, tinyclip_jax, weightgen
for package in (lit_jax, tinyclip_jax, learngene):
    package.train.Config
weightgen.train.LoopConfig
"""


def test_it_is_that_module_whatever_was_imported_before():
    done = subprocess.run([sys.executable, "-c", WHATEVER_WAS_IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_users_recipe_may_hold_such_a_module():
    """Recipes go to worker processes by cloudpickle, with the modules they imported."""
    assert pickle.loads(cloudpickle.dumps(tinyclip_jax.train)) is tinyclip_jax.train
