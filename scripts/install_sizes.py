"""Measures what each dependency and each extra adds to an installation, in MB, for docs/install.md.

    python scripts/install_sizes.py                    # prints the table: the packages of this environment
    python scripts/install_sizes.py --extra torch      # and what an extra that is installed here adds

Sizes are of installed files.
"""

import argparse
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
LEAST = 4.0  # MB of a package with a row of its own


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def needs(found: Distribution, extras: Iterable[str] = ()) -> list[Requirement]:
    """Returns what a package requires here, with some of its extras."""
    wanted = [Requirement(text) for text in found.requires or ()]
    names = ["", *extras]
    return [r for r in wanted if r.marker is None or any(r.marker.evaluate({"extra": name}) for name in names)]


def closure(roots: Iterable[str]) -> dict[str, Distribution]:
    """Returns the installed packages that these requirements bring, by name."""
    found: dict[str, Distribution] = {}
    todo = [Requirement(text) for text in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name in found and not requirement.extras:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        todo += [r for r in needs(found[name], requirement.extras) if canonicalize_name(r.name) not in found]
    return found


def size(found: Distribution) -> float:
    """Returns the size of a package's installed files, in MB."""
    paths = (Path(str(found.locate_file(file))) for file in found.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file()) / MB


def rows(least: float) -> list[tuple[str, float, list[str]]]:
    """Returns (package, MB, the dependencies of ours that bring it) for packages of `least` MB, the largest first."""
    roots = project()["dependencies"]
    brought = {canonicalize_name(Requirement(root).name): closure([root]) for root in roots}
    whole = closure(roots)
    sizes = {name: size(found) for name, found in whole.items()}
    large = sorted((name for name in sizes if sizes[name] >= least), key=lambda name: -sizes[name])
    shown = [(name, sizes[name], [root for root, found in brought.items() if name in found]) for name in large]
    rest = [name for name in sizes if sizes[name] < least]
    smaller = (f"{len(rest)} smaller ones", sum(sizes[name] for name in rest), [])
    return [*shown, smaller, ("all", sum(sizes.values()), [])]


def extra_size(extra: str) -> tuple[float, list[str]]:
    """Returns MB of the installed packages that an extra adds to the dependencies, and its packages not installed."""
    roots = project()["optional-dependencies"][extra]
    added = {name: found for name, found in closure(roots).items() if name not in closure(project()["dependencies"])}
    own = [canonicalize_name(Requirement(root).name) for root in roots]
    return sum(map(size, added.values())), [name for name in own if name not in closure(roots)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--extra", nargs="*", default=[], metavar="NAME")
    args = parser.parse_args()
    print("| package | MB | needed by |\n|---|---:|---|")
    for name, total, roots in rows(LEAST):
        by = "itself" if roots == [name] else ", ".join(sorted(roots, key=lambda root: root != name)[:4])
        print(f"| {name} | {total:,.0f} | {by}{', ...' if len(roots) > 4 else ''} |")
    for extra in args.extra:
        total, missing = extra_size(extra)
        note = f"without {', '.join(missing)}, which is not installed here" if missing else ""
        print(f"| extra {extra} | {total:,.0f} | {note} |")


if __name__ == "__main__":
    main()
