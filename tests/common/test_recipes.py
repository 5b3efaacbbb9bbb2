"""The resolved config of each recipe as text, so that a change of any value shows as a diff of a few lines.

`golden/configs/defaults.json` has the defaults of each config class, a file per method the fields of each recipe that
differ from them. Rewrite all with `python tests/common/test_recipes.py` and read the diff.
"""

import json
import re
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

import pytest

from heirloom.common import config

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
RECIPES = config.recipes()
METHODS = sorted({name.split("/")[0] for name in RECIPES})


def name_of(kind):
    return f"{kind.__module__}.{kind.__qualname__}"


def default(field):
    return field.default if field.default_factory is MISSING else field.default_factory()


def difference(value, usual=MISSING):
    """The fields of a config that are not its class's defaults, nested; the class is named unless as in `usual`."""
    if isinstance(value, list | tuple):
        return [difference(item) for item in value]
    if not is_dataclass(value):
        return value
    # The repr tells 1 from 1.0 and True, and one class from another.
    both = {f.name: (getattr(value, f.name), default(f)) for f in fields(value)}
    own = {name: difference(*pair) for name, pair in both.items() if repr(pair[0]) != repr(pair[1])}
    return own if type(value) is type(usual) else {"class": name_of(type(value))} | own


def defaults(value, found):
    """Adds the defaults of the classes of and in `value`: {class: {field: value}}, without required fields."""
    if isinstance(value, list | tuple):
        for item in value:
            defaults(item, found)
    if is_dataclass(value):
        known = {f.name: default(f) for f in fields(value) if default(f) is not MISSING}
        fresh = name_of(type(value)) not in found
        found[name_of(type(value))] = {name: difference(usual) for name, usual in known.items()}
        for inner in [getattr(value, f.name) for f in fields(value)] + (list(known.values()) if fresh else []):
            defaults(inner, found)
    return found


def restored(entry, classes, kind=None):
    """All values of a config from its `difference` and the defaults of `classes`."""
    if isinstance(entry, list):
        return [restored(item, classes) for item in entry]
    if not isinstance(entry, dict):
        return entry
    usual = classes[entry.get("class", kind)]
    whole = usual | {name: value for name, value in entry.items() if name != "class"}
    kinds = {name: value.get("class") for name, value in usual.items() if isinstance(value, dict)}
    return {name: restored(value, classes, kinds.get(name)) for name, value in whole.items()}


def text(value, *, sort=True):
    """JSON, a line for each field; a list of numbers or texts stands on one."""
    lines = json.dumps(value, indent=1, sort_keys=sort)
    return re.sub(r"\[\s+[^][{}]*\]", lambda found: json.dumps(json.loads(found[0])), lines) + "\n"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def all_defaults():
    found = {}
    for name in RECIPES:
        defaults(config.load(name), found)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_what_it_was(name):
    assert text(difference(config.load(name))) == text(golden(name.split("/")[0])[name])


def test_defaults_are_what_they_were():
    assert text(all_defaults()) == text(golden("defaults"))


def test_golden_files_hold_every_value_of_every_recipe():
    classes = golden("defaults")
    held = {name: restored(entry, classes) for method in METHODS for name, entry in golden(method).items()}
    assert text(held) == text({name: asdict(config.load(name)) for name in RECIPES})


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_how_to_run_it(name):
    source = (config.SHIPPED / f"{name}.py").read_text()
    verb = "train" if hasattr(config.load(name), "train") else "inherit"
    assert f"heirloom {verb} {name} " in source.split('"""')[1]


if __name__ == "__main__":
    (GOLDEN / "defaults.json").write_text(text(all_defaults(), sort=False))
    for method in METHODS:
        entries = {name: difference(config.load(name)) for name in RECIPES if name.startswith(f"{method}/")}
        (GOLDEN / f"{method}.json").write_text(text(entries, sort=False))
