"""An extension of griffe for mkdocs.yml: our docstrings are plain text with code between backticks, not Markdown."""

import re
from typing import Any

import griffe


class Plain(griffe.Extension):
    """Escapes what Markdown would take for links, emphasis and tags: `[batch, *place]` and `<|endoftext|>` are text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n".join(map(_escaped, obj.docstring.value.splitlines()))


def _escaped(line: str) -> str:
    if line.startswith("    "):  # code
        return line
    parts = line.split("`")
    parts[::2] = [re.sub(r"([][*_])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
