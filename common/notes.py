"""What a command did on its own account: files it left out, an order it assumed. One line each, on standard error."""

import sys
from functools import cache


@cache
def note(line: str) -> None:
    """Print `heirloom: note: LINE` to standard error, each line once per command (`note.cache_clear` starts the next one)."""
    print(f"heirloom: note: {line}", file=sys.stderr)
