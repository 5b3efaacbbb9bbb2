"""Small real files to read: every test writes what it reads."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _encode(value: int, size: tuple[int, int] = (12, 10), form: str = "PNG") -> bytes:
    """A flat grey picture: its value says which one it is."""
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, form)
    return out.getvalue()


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return _encode


@pytest.fixture
def grey() -> Callable[[bytes], int]:
    """The value of a picture made by `picture`."""
    return lambda data: int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0])


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """A shard whose samples count up from `first`: 000000.png (grey = number), 000000.txt, 000000.json."""

    def write(path: Path, first: int, count: int, extensions: tuple[str, ...] = ("png", "txt", "json")) -> Path:
        with tarfile.open(path, "w") as tar:
            for i in range(first, first + count):
                contents = {
                    "png": _encode(i),
                    "txt": f"caption {i}".encode(),
                    "json": json.dumps({"caption": f"json {i}", "recaption": f"better {i}", "score": i / 2}).encode(),
                    "cls": str(i % 3).encode(),
                }
                for extension in extensions:
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(contents[extension])
                    tar.addfile(info, io.BytesIO(contents[extension]))
        return path

    return write
