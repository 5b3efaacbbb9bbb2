"""The hook of mkdocs.yml: pages that are generated, and files of the repository that the pages link to.

Nothing is imported but `heirloom.common.arguments`, which is light: mkdocs runs without jax. Pages and files are added
to the site in memory; the sources of the API pages are read through links in a temporary folder.
"""

import argparse
import ast
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = "repository"  # the folder of the site for files that lie outside docs/
PAGES = ("CONTRIBUTING.md",)  # pages of the site that no other page needs to link to
PACKAGES = ("tinyclip_jax", "lit_jax", "learngene", "weightgen")
API: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tinyclip": (
        "tinyclip_jax",
        "TinyCLIP: load a CLIP, inherit from it, train the student.",
        (
            "tinyclip_jax.pretrained",
            "tinyclip_jax.model",
            "tinyclip_jax.inherit",
            "tinyclip_jax.losses",
            "tinyclip_jax.masks",
            "tinyclip_jax.zoo",
        ),
    ),
    "lit": (
        "lit_jax",
        "LiT, the linear diffusion transformer: load, draw, inherit, distil.",
        (
            "lit_jax.pretrained",
            "lit_jax.dit",
            "lit_jax.pixart",
            "lit_jax.linear_attention",
            "lit_jax.inherit",
            "lit_jax.losses",
            "lit_jax.sample",
        ),
    ),
    "learngene": (
        "learngene",
        "SWS: genes, and the models of any depth that start from them.",
        (
            "learngene.pretrained",
            "heirloom.common.vit.model",
            "learngene.expand",
            "heirloom.common.vit.stages",
            "learngene.relatives",
            "learngene.ligo",
            "learngene.losses",
        ),
    ),
    "weightgen": (
        "weightgen",
        "D2NWG: zoos, codecs, generators of weights, and baselines.",
        (
            "weightgen.pretrained",
            "weightgen.tokens",
            "weightgen.codec",
            "weightgen.generator.config",
            "weightgen.generator.model",
            "weightgen.generator.loss",
            "weightgen.generator.sample",
            "weightgen.d2nwg.model",
            "weightgen.baselines",
            "weightgen.ranking",
        ),
    ),
    "surgery": (
        "heirloom.common.surgery",
        "Axes, maps, plans, grafts and layouts: how a student gets a donor's weights.",
        (
            "heirloom.common.surgery.axes",
            "heirloom.common.surgery.maps",
            "heirloom.common.surgery.plan",
            "heirloom.common.surgery.graft",
            "heirloom.common.surgery.layout",
        ),
    ),
    "training": (
        "heirloom.common",
        "Models as functions, recipes, data sources, the parts of a method, diffusion and its samplers.",
        (
            "heirloom.common.notebook.model",
            "heirloom.common.notebook.run",
            "heirloom.common.nn.functional",
            "heirloom.common.config",
            "heirloom.common.data.sources",
            "heirloom.common.train.parts",
            "heirloom.common.train.recipe",
            "heirloom.common.train.step",
            "heirloom.common.diffusion",
            "heirloom.common.errors",
        ),
    ),
}
"""Page of the API: its title, what it is about, and its modules."""
_LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<open>\]\()(?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


# Links, which mean the same in a file browser of the repository and in the site


def links(markdown: str) -> Iterator[str]:
    """Yields the targets of a page's links to other files and to anchors, outside of code; no web addresses."""
    for found in _LINK.finditer(markdown):
        target = found["target"]
        if target and not re.match(r"[a-z]+:", target):
            yield target


def anchors(markdown: str) -> set[str]:
    """Returns the anchors of a page's headings, which GitHub and mkdocs name alike for the words we use."""
    headings = _HEADING.findall(re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE))
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


def resolve(page: str, target: str) -> tuple[str, str]:
    """Returns the file that a link on a page leads to, and the anchor; both paths are relative to the repository.

    A link to a folder leads to its README.md, if there is one.
    """
    path, _, anchor = target.partition("#")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if (ROOT / file / "README.md").is_file():
        file = f"{file}/README.md"
    return file, anchor


def site_path(file: str) -> str:
    """Returns where a file of the repository lies in the site."""
    return file.removeprefix("docs/") if file.startswith("docs/") else f"{COPIED}/{file}"


def repository_path(path: str) -> str:
    """The inverse of `site_path`."""
    return path.removeprefix(f"{COPIED}/") if path.startswith(f"{COPIED}/") else f"docs/{path}"


def linked() -> list[str]:
    """Returns the files outside docs/ that its pages link to, and so on from the pages among these."""
    todo = [*(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")), *PAGES]
    seen = set(todo)
    for page in todo:  # grows
        if page.endswith(".md"):
            for target in links((ROOT / page).read_text()):
                file, _ = resolve(page, target)
                if file not in seen and (ROOT / file).is_file():
                    seen.add(file)
                    todo.append(file)
    return sorted(file for file in seen if not file.startswith("docs/"))


# Generated pages


def generated() -> dict[str, str]:
    """Returns the generated pages: where each lies in the site, and its Markdown."""
    pages = {"reference/commands.md": commands(), "reference/recipes.md": recipes()}
    return pages | {f"reference/python/{name}.md": api(*page) for name, page in API.items()}


def commands() -> str:
    """Returns the page of the command line, from the table of verbs."""
    sys.path.insert(0, str(ROOT))
    try:
        from heirloom.common.arguments import VERBS
    finally:
        sys.path.remove(str(ROOT))
    rows = [f"| [`{verb.name}`](#{verb.name}) | {_cell(verb.help)} |" for verb in VERBS]
    text = ["# Command line", "`heirloom VERB --help` prints the same in a terminal."]
    text += ["\n".join(["| verb | what it does |", "|---|---|", *rows])]
    text += [
        "Exit codes: 0 done; 1 a verification failed; 2 bad input, and the message says how to correct it; 75 a "
        "training stopped on request, and the same command continues it; 130 interrupted."
    ]
    for verb in VERBS:
        parser = argparse.ArgumentParser(prog=f"heirloom {verb.name}", add_help=False)
        for one in verb.arguments:
            parser.add_argument(*one.names, **one.options)
        table = [_argument(one) for one in verb.arguments]
        if verb.json:
            parser.add_argument("--json", metavar="FILE")
            table.append("| `--json FILE` | write the result as data, too |")
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        text += [f"## {verb.name}", _sentence(verb.help), f"```text\n{_wrapped(usage)}\n```"]
        if verb.more:
            text.append(re.sub(r"(heirloom \w+ RECIPE --help|--[\w.]+ [\w-]+)", r"`\1`", verb.more))
        if table:
            text.append("\n".join(["| argument | meaning |", "|---|---|", *table]))
    return "\n\n".join(text) + "\n"


def _argument(one: Any) -> str:
    """Returns the row of an argument: names, what it means, choices, default."""
    options = one.options
    metavar = options.get("metavar") or ("{" + ",".join(options["choices"]) + "}" if "choices" in options else "")
    flags = one.names[0].startswith("-")
    if flags and not metavar and "action" not in options:
        metavar = one.names[0].lstrip("-").upper()
    names = ", ".join(one.names) if flags else metavar or one.names[0]
    names = f"{names} {metavar}".strip() if flags else names
    meaning = [options["help"]] if "help" in options else []
    default = options.get("default")
    shown = isinstance(default, int | float | str | Path) and not isinstance(default, bool) and default != ""
    if shown and "default" not in options.get("help", ""):
        meaning.append(f"default: {default}")
    if options.get("required"):
        meaning.append("required")
    if one.buckets:
        meaning.append("also in a bucket")
    return f"| `{_cell(names)}` | {_cell('; '.join(meaning))} |"


def recipes() -> str:
    """Returns the page of the shipped recipes: name and first sentence, and the whole docstring folded."""
    names = sorted(path.relative_to(ROOT / "configs").with_suffix("") for path in (ROOT / "configs").glob("*/*.py"))
    names = [name for name in names if name.name != "__init__"]
    text = [
        "# Recipes",
        "A recipe is a Python file with `get_config()`. `heirloom recipes` prints this list, `heirloom inspect NAME` "
        "describes a student, and `heirloom train NAME --run DIR` runs it. Open a recipe to see its command, hardware "
        "and expected score.",
    ]
    for method, group in groupby(names, key=lambda name: name.parts[0]):
        text.append(f"## {method}")
        for name in group:
            said = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text())) or ""
            first, _, rest = said.partition("\n\n")
            block = "\n".join(f"    {line}".rstrip() for line in _as_code(rest).splitlines())
            heading = f"### {name.as_posix()}\n\n{' '.join(first.split())}"
            text.append(f'{heading}\n\n??? note "How to run it, and what to expect"\n\n{block}' if rest else heading)
    return "\n\n".join(text) + "\n"


def api(title: str, about: str, modules: tuple[str, ...]) -> str:
    """Returns a page of the Python API; mkdocstrings reads the modules."""
    return "\n\n".join([f"# {title}", about, *(f"::: {module}" for module in modules)]) + "\n"


def _as_code(docstring: str) -> str:
    """Indents the paragraphs that are commands, so that Markdown shows them as code."""

    def shown(paragraph: str) -> str:
        lines = paragraph.splitlines()
        is_code = all(line.startswith(("heirloom ", "python ")) for line in lines)
        return "\n".join(f"    {line}" for line in lines) if is_code else paragraph

    return "\n\n".join(shown(paragraph) for paragraph in docstring.split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _wrapped(usage: str) -> str:
    """Breaks a usage between its arguments, at 80 characters."""
    lines = [""]
    for part in re.findall(r"\[[^]]*(?:\[[^]]*\][^]]*)*\]|\S+", usage):
        if len(lines[-1]) + len(part) > 78:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "\n".join(lines)


# Events of mkdocs


@cache
def _staged() -> tempfile.TemporaryDirectory[str]:
    """Links to the packages as they are imported: `common` and `configs` inside `heirloom`."""
    folder = tempfile.TemporaryDirectory(prefix="heirloom-docs-")
    stage = Path(folder.name)
    (stage / "heirloom").mkdir()
    (stage / "heirloom" / "__init__.py").symlink_to(ROOT / "heirloom" / "__init__.py")
    for name in ("common", "configs"):
        (stage / "heirloom" / name).symlink_to(ROOT / name)
    for name in PACKAGES:
        (stage / name).symlink_to(ROOT / name)
    return folder


def on_config(config: Any) -> Any:
    """Tells mkdocstrings where the packages are."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_staged().name]
    config.watch += [str(ROOT / name) for name in ("common", "configs", *PACKAGES)]
    return config


on_config.mkdocs_priority = 100  # type: ignore[attr-defined] # before mkdocstrings, which reads the paths in its own


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages, and the files that pages link to outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for path, markdown in generated().items():
        files.append(File.generated(config, path, content=markdown))
    for name in linked():
        level = InclusionLevel.INCLUDED if name in PAGES else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, site_path(name), abs_src_path=str(ROOT / name), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links between files of the repository into links between files of the site."""
    path = page.file.src_uri
    if path.startswith("reference/"):
        return markdown
    here = repository_path(path)

    def changed(found: re.Match[str]) -> str:
        target = found["target"]
        if not target or re.match(r"[a-z]+:", target) or target.startswith("#"):
            return found[0]
        file, anchor = resolve(here, target)
        relative = posixpath.relpath(site_path(file), PurePosixPath(path).parent.as_posix())
        return f"]({relative}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(changed, markdown)


def on_shutdown() -> None:
    """Removes the temporary folder."""
    _staged().cleanup()
