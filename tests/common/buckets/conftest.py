"""Buckets: fsspec's memory always; servers on this machine that speak the protocols of GCS and S3 where installed."""

import io
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from heirloom.common import paths, reading
from heirloom.common.paths import Address, place


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def gs() -> Iterator[None]:
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server")
    port = _port()
    where = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GOOGLE_CLOUD_PROJECT": "x", "NO_GCE_CHECK": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in where.items():
            patch.setenv(name, value)
        # A client that hangs up early would be a traceback on stderr.
        patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
        running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="pod")
        running.start()
        yield
        running.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import boto3

    port = _port()
    where = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (where | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}).items():
            patch.setenv(name, value)
        running = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
        running.start()
        boto3.client("s3").create_bucket(Bucket="pod")
        yield
        running.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of local copies; reads that fail are tried again at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "WAITS", (0, 0))
    monkeypatch.setattr(paths, "WAITS", ())
    monkeypatch.setattr(reading, "_trusted", {})
    return tmp_path / "cache" / "heirloom"


@pytest.fixture(params=["memory", "gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Address:
    """A new folder in a bucket."""
    if request.param != "memory":
        request.getfixturevalue(request.param)
    return _folder(request.param, request.node.name)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Address:
    """A new folder in memory."""
    return _folder("memory", request.node.name)


def _folder(scheme: str, name: str) -> Address:
    found = place(f"{scheme}://pod/{''.join(c if c.isalnum() else '-' for c in name)}")
    assert isinstance(found, Address)
    return found


@pytest.fixture
def put() -> Callable[[Path, Address], None]:
    """Copies the files of a local folder to a folder in a bucket."""

    def copy(local: Path, remote: Address) -> None:
        for file in sorted(local.rglob("*")):
            if file.is_file():
                remote.child(file.relative_to(local).as_posix()).write_bytes(file.read_bytes())

    return copy


@pytest.fixture
def picture() -> Callable[[int], bytes]:
    """Encodes a flat grey picture."""

    def encode(value: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (12, 10), (value, value, value)).save(out, "PNG")
        return out.getvalue()

    return encode


@pytest.fixture
def write_tar(picture: Callable[[int], bytes]) -> Callable[[Path, int, int], Path]:
    """Writes a shard of samples numbered from `first`: a .png of that grey value, a .txt, a .cls."""

    def write(path: Path, first: int, count: int) -> Path:
        with tarfile.open(path, "w") as tar:
            for i in range(first, first + count):
                for extension, data in {"png": picture(i), "txt": b"caption %d" % i, "cls": b"%d" % (i % 3)}.items():
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return path

    return write
