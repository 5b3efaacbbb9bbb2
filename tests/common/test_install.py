"""An installed heirloom and a checkout both work in a folder that holds a user's own common.py and configs/."""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Which files were imported, and that the shipped recipes are found next to them.
PROBE = """
import sys
from pathlib import Path
import heirloom.common.config as config, tinyclip_jax
from heirloom.common.cli import main
assert main(["inspect", "tinyclip/smoke"]) == 0
print(Path(config.__file__).parents[1], config.SHIPPED.parent, Path(tinyclip_jax.__file__).parents[1])
"""


@pytest.fixture
def hostile(tmp_path):
    """A folder of notebooks whose own modules have our folders' names."""
    folder = tmp_path / "notebooks"
    (folder / "configs").mkdir(parents=True)
    for file in (folder / "common.py", folder / "configs" / "__init__.py"):
        file.write_text("raise SystemExit('the user\\'s own module was imported')\n")
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """An environment with this tree's wheel; dependencies are those of this environment, without our install."""
    folder = tmp_path_factory.mktemp("fresh")
    wheels, env = folder / "wheels", folder / "env"
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
    ]
    subprocess.run(build, check=True)
    venv.create(env, with_pip=False)
    python = env / "bin" / "python"
    (wheel,) = wheels.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True)
    (packages,) = env.glob("lib/python*/site-packages")
    # paths named there have their own .pth files ignored
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


def probe(python: Path | str, folder: Path, **env: str) -> list[str]:
    """The folders that hold common/, configs/ and tinyclip_jax/, as imported by a program in `folder`."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run([str(python), "-c", PROBE], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_the_wheel_works_next_to_a_users_own_common(fresh, hostile):
    (packages,) = fresh.parents[1].glob("lib/python*/site-packages")
    inside = str(packages / "heirloom")
    assert probe(fresh, hostile) == [inside, inside, str(packages)]
    assert not (packages / "common").exists() and not (packages / "configs").exists()


def test_a_checkout_works_next_to_a_users_own_common(hostile):
    assert probe(sys.executable, hostile, PYTHONPATH=str(ROOT)) == [str(ROOT)] * 3
