"""Runs notebooks as a user would, each in a fresh folder that holds a `common.py` and a `configs.py` of somebody else.

    python scripts/run_notebooks.py notebooks/*.ipynb --out executed

Needs the extra `notebooks`. It runs with the Python that runs this file, so install the wheel into a fresh environment
first, as .ci/run does. An error in a cell, and a command (`!heirloom ...`) that fails, end it with exit code 1.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

CHECK = "assert _exit_code == 0, f'the command above ended with exit code {_exit_code}'"


def checked(source: str) -> str:
    """Adds a check after each line that is a command: IPython itself goes on when a command fails."""
    return re.sub(r"^( *)(!.*)$", rf"\1\2\n\1{CHECK}", source, flags=re.MULTILINE)


def run(file: Path, folder: Path, out: Path | None, seconds: int) -> None:
    """Executes a notebook in `folder`. out: where the executed copy goes. seconds: at most, of one cell.

    Raises CellExecutionError or CellTimeoutError.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = checked(cell.source)
    where = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=seconds, kernel_name="python3", resources=where)
    try:
        client.execute()
    finally:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, out / file.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the executed notebooks, with outputs, here")
    parser.add_argument("--seconds", type=int, default=900, help="the longest that one cell may take (default: 900)")
    args = parser.parse_args()
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    # The kernel's commands: those of this environment. Its modules: not those of a checkout around us.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.pop("PYTHONPATH", None)
    for file in args.notebooks:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for module in ("common.py", "configs.py"):
                (folder / module).write_text("raise SystemExit(\"the user's own module was imported\")\n")
            try:
                run(file.resolve(), folder, args.out, args.seconds)
            except (CellExecutionError, CellTimeoutError) as error:
                print(f"{file.name}: {error}", flush=True)
                return 1
        print(f"{file.name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
