"""The pages in docs/, README.md and CONTRIBUTING.md: links, anchors, the site's navigation, the list of deviations."""

import re
from fnmatch import fnmatch
from pathlib import Path

import docs_site
import pytest

from heirloom.common import config

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, "README.md", "CONTRIBUTING.md"]
CODE = ("common", "configs", "tinyclip_jax", "lit_jax", "learngene", "weightgen")


def text(page):
    return (ROOT / page).read_text()


def broken(page, markdown):
    """The links of a page that lead to no file, or to no heading of a page."""
    found = []
    for link in docs_site.links(markdown):
        file, anchor = docs_site.resolve(page, link)
        here = (ROOT / file).exists() and not file.startswith("..") and not link.startswith("/")
        if not here or (anchor and anchor not in docs_site.anchors(markdown if file == page else text(file))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken(page, text(page)) == []


def test_broken_links_are_found():
    page = """# A page
[a](convert.md#sources) [b](convert.md#no-such) [c](gone.md) [d](#a-page) [e](#b-page) [f](../infra)
[g](https://example.org) `[h](gone.md)`
```
[i](gone.md)
# no heading
```
[j](#no-heading) [k](../../x.md)
"""
    expected = ["convert.md#no-such", "gone.md", "#b-page", "#no-heading", "../../x.md"]
    assert broken("docs/python.md", page) == expected


def test_anchors_are_those_of_github_and_mkdocs():
    assert docs_site.anchors("## Genes (SWS)\n### LiT from a DiT\n# Six claims: on Fashion-MNIST\n") == {
        "genes-sws",
        "lit-from-a-dit",
        "six-claims-on-fashion-mnist",
    }


def test_navigation_has_every_page_once():
    nav = re.search(r"^nav:\n((?:[ #].*\n|\n)*)", text("mkdocs.yml"), re.MULTILINE)
    named = re.findall(r"[\w/-]+\.md\b", nav[1])
    made = [*docs_site.generated(), *map(docs_site.site_path, docs_site.PAGES)]
    assert sorted(named) == sorted([*(page.removeprefix("docs/") for page in DOCS), *made])


def test_the_list_of_pages_has_every_page():
    listed = {docs_site.resolve("docs/README.md", link)[0] for link in docs_site.links(text("docs/README.md"))}
    assert set(DOCS) - listed == {"docs/README.md"}


def test_files_outside_docs_come_along():
    outside = docs_site.linked()
    assert {"CONTRIBUTING.md", "README.md", "infra/README.md", "benchmarks/results/lit_cpu.png"} <= set(outside)
    assert all((ROOT / file).is_file() and not file.startswith("docs/") for file in outside)
    assert docs_site.repository_path(docs_site.site_path("infra/README.md")) == "infra/README.md"
    assert docs_site.repository_path(docs_site.site_path("docs/lit.md")) == "docs/lit.md"


def test_modules_of_the_python_api_exist():
    modules = [module for _, _, names in docs_site.API.values() for module in names]
    paths = [module.removeprefix("heirloom.").replace(".", "/") for module in modules]
    assert [path for path in paths if not (ROOT / f"{path}.py").is_file() and not (ROOT / path).is_dir()] == []


def test_commands_and_recipes_are_on_the_generated_pages():
    pages = docs_site.generated()
    assert "| `--quantize {int8}` | matmul kernels as int8 with a scale per output channel |" in pages[
        "reference/commands.md"
    ]
    assert "| `SOURCE` | hf:org/name[@revision]" in pages["reference/commands.md"]
    recipes = pages["reference/recipes.md"]
    assert re.findall(r"^### (\S+)$", recipes, re.MULTILINE) == config.recipes()
    assert "        heirloom train tinyclip/emoji --run runs/emoji " in recipes


def test_every_deviation_in_the_code_is_on_the_page_of_a_method():
    """A file that departs from a paper or its released code is named in a table of docs/methods."""
    named = [name for page in DOCS if "/methods/" in page for name in re.findall(r"`([\w/*]+\.py)`", text(page))]
    files = [path.relative_to(ROOT).as_posix() for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    departs = [file for file in files if re.search(r"Deviation\b.{0,20}:", text(file))]
    assert len(departs) > 15
    assert [file for file in departs if not any(fnmatch(file, name) for name in named)] == []
    assert [name for name in named if not any(fnmatch(file, name) for file in departs)] == []
