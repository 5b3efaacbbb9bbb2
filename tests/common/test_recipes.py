"""The resolved config of each recipe as text: a change of a default shows as a diff of these files.

Rewrite them with `python tests/common/test_recipes.py` and read the diff.
"""

import json
from pathlib import Path

import pytest

from heirloom.common import config

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
RECIPES = config.recipes()


def text(name):
    return json.dumps(config.to_json(config.load(name)), indent=1) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_it_was(name):
    assert text(name) == (GOLDEN / f"{name.replace('/', '-')}.json").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_how_to_run_it(name):
    source = (config.SHIPPED / f"{name}.py").read_text()
    assert f"heirloom train {name} " in source.split('"""')[1]


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        (GOLDEN / f"{recipe.replace('/', '-')}.json").write_text(text(recipe))
