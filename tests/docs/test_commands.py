"""The commands in docs/ and README.md: each is one that heirloom accepts; those of the tour run."""

import pkgutil
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from heirloom.common import cli, config
from heirloom.common.arguments import VERBS
from heirloom.common.errors import InputError

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
FLAGGED = {verb.name for verb in VERBS if verb.flags}
RECIPES = set(config.recipes())


def commands(page):
    """The lines `heirloom ...` of a page's shell blocks, as lists of words."""
    return commands_in((ROOT / page).read_text())


def commands_in(markdown):
    """The same of a text; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    lines = "\n".join([*blocks, *re.findall(r"^    heirloom .*", markdown, re.MULTILINE)]).replace("\\\n", " ")
    found = (re.match(r"\s*(?:\.venv/bin/)?heirloom (.*)", line) for line in lines.splitlines())
    return [shlex.split(line[1], comments=True) for line in found if line]


def takes(path, flags):
    """Whether a config, "package.module.Class", has these flags."""
    try:
        config.parse(pkgutil.resolve_name(path)(), flags, "")
    except InputError:
        return False
    return True


def check(words):
    """Fails where a verb, an argument, a recipe or a flag of a recipe does not exist. `...` stands for a value, or for
    more flags.
    """
    words = [re.sub(r"\b(gs|s3)://", "memory://", word) for word in words]  # needs no further library
    words = [word for before, word in pairwise(["", *words]) if word != "..." or before.startswith("--")]
    args, flags = cli._parser().parse_known_args(words)
    assert not flags or args.verb in FLAGGED, words
    recipe = getattr(args, "config", None) or getattr(args, "what", None)
    if args.verb == "compare":  # takes lists with commas as well
        flags = [part for flag in flags for part in flag.split(",")]
    if recipe in RECIPES:
        config.load(recipe, flags, args.verb)
    elif flags and (known := next(verb.settings for verb in VERBS if verb.name == args.verb)):
        assert any(takes(path, flags) for path in known), words
    else:
        assert getattr(args, "config", "RECIPE") in ("RECIPE", "CONFIG"), words


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    for words in commands(page):
        if words[0] != "VERB":
            check(words)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    """All but its training, its evaluation and its report, which have tests of their own."""
    monkeypatch.chdir(tmp_path)
    shown = {}
    for words in commands("docs/tour.md"):
        if not any(word.startswith("runs/") for word in words):
            assert cli.main(words) == 0, words
            shown[" ".join(words[:2])] = capsys.readouterr().out
    assert list(shown) == [
        "recipes tinyclip/",
        "inspect tinyclip/emoji",
        "inherit tinyclip/emoji",
        "inspect student",
        "eval student",
        "sample embedded:digits_dit",
    ]
    assert re.search(r"^tinyclip/emoji ", shown["recipes tinyclip/"], re.MULTILINE)
    assert "layer=2 embed=192 -> head=3 head_dim=64" in shown["inspect tinyclip/emoji"]
    score = re.search(r"^emoji/test +r1 +(\S+)", shown["eval student"], re.MULTILINE)
    assert float(score[1]) == pytest.approx(1.06, abs=0.2)
    assert Path("digits.png").is_file()
