"""What the light commands leave out: packages that read data, draw, or know data sets take seconds to import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("grain", "array_record", "pyarrow", "matplotlib", "tensorflow_datasets", "tensorflow", "torch", "transformers")
PROBE = f"""
import importlib, sys

def done(step):
    found = [name for name in {HEAVY} if name in sys.modules]
    assert not found, f"{{step}} imports {{', '.join(found)}}"

for package in ("tinyclip_jax", "lit_jax", "learngene", "weightgen"):
    names = importlib.import_module(package).__all__
    done(f"import {{package}}")
    for name in names:
        getattr(importlib.import_module(package), name)
        done(f"{{package}}.{{name}}")

from heirloom.common.cli import main
for line in (
    "recipes tinyclip/",
    "inspect tinyclip/smoke",
    "inspect learngene/smoke",
    "inherit tinyclip/emoji student",
    "inspect student",
    "convert student hf --to hf --no-verify",
):
    assert main(line.split()) == 0
    done(f"heirloom {{line}}")
print("light")
"""


def test_importing_inspecting_inheriting_converting_are_light(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("light\n"), done.stderr


def test_heavy_packages_would_be_found(tmp_path):
    """The names are those of packages that heirloom does import, when it reads data or draws."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    code = "import sys, heirloom.common.data.stream, pyarrow.parquet, matplotlib.figure\n" + "\n".join(
        f"assert {name!r} in sys.modules" for name in ("grain", "array_record", "pyarrow", "matplotlib")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
