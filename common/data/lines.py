"""Text files with one entry a line: class names, templates."""


from heirloom.common.errors import InputError
from heirloom.common.paths import AnyPath


def read_lines(file: AnyPath) -> tuple[str, ...]:
    """Reads the lines of a UTF-8 file, stripped of white space; blank lines at the end are dropped.

    Raises InputError for a file that is missing, empty, not UTF-8, or has a blank line in between: line numbers have a
    meaning.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable as UTF-8 text: {error}") from error
    if not lines:
        raise InputError(f"{file} is empty: write one entry a line")
    if "" in lines:
        raise InputError(f"{file}, line {lines.index('') + 1} is blank; write one entry a line, without blank lines")
    return tuple(lines)
