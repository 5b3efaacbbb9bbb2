"""The trainings that `soak.py` disturbs, and their processes."""

import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LIMIT = float(os.environ.get("SOAK_LIMIT", "900"))  # seconds until a command that has not ended hangs
STEPS, SAVE = 12, 3
COMMON = ("--steps", str(STEPS), "--save-every", str(SAVE), "--log-every", "1", "--optim.warmup", "2")
PICTURES = ("--data.split", "", "--held-out.path", "", "--pipeline.batch", "16")
ANY = ("kill", "kill in a save", "kill at the end", "SIGTERM", "disk full", "damaged state")


@dataclass(frozen=True)
class Method:
    """A training. flags: `{data}` is the folder of the data. own: the kinds of fault that only it can have."""

    name: str
    recipe: str
    flags: tuple[str, ...]
    own: tuple[str, ...] = ()
    processes: int = 1

    def takes(self, kind: str) -> bool:
        return kind in self.own or (kind in ANY and (self.processes == 1 or kind != "disk full"))


STREAM = ("--storage", "stream", "--pipeline.bad", "stop")
CLASSES = ("--label", "label", "--student.classes", "3")
SMALL = ("--denoiser.width", "32", "--denoiser.layers", "1", "--denoiser.heads", "2", "--denoiser.hidden", "32")
CLIP = (*COMMON, *PICTURES, "--data.path", "{data}/shards/{0..2}.tar", "--pipeline.bad", "stop")
METHODS = (
    Method("tinyclip", "tinyclip/smoke", CLIP, ("shard gone", "bucket fails")),
    Method("tinyclip, 2 processes", "tinyclip/smoke", (*CLIP, "--mesh.data", "2"), ("kill one",), processes=2),
    # Two of the pictures are broken from the start, and others take their places.
    Method(
        "lit",
        "lit/smoke",
        (*COMMON, *PICTURES, "--data.path", "{data}/broken", *CLASSES),
    ),
    Method(
        "learngene",
        "learngene/smoke",
        (*COMMON, *PICTURES, "--data.path", "{data}/classes", *CLASSES, *STREAM),
        ("picture broken",),
    ),
    Method(
        "weightgen",
        "weightgen/generator",
        (*COMMON, "--zoo", "{data}/zoo/zoo", "--latent", "4", "--batch", "16", *SMALL, "--gate.force"),
    ),
)


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    return clean | quick | {"PYTHONPATH": path, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def command(method: Method, run: Path | str, data: Path | str) -> list[str]:
    flags = [flag.replace("{data}", str(data)) for flag in method.flags]
    return ["train", method.recipe, "--run", str(run), *flags]


@dataclass
class Process:
    """A training that a zygote started. code: its exit code, minus N when signal N ended it; None while it runs."""

    pid: int
    code: int | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def signal(self, number: int) -> None:
        """Sends a signal unless it has ended: then its id may be that of another process."""
        if not self.ended.is_set():
            os.kill(self.pid, number)


class Zygote:
    """Starts trainings (`soak_zygote.py`). One command at a time may be started."""

    def __init__(self) -> None:
        argv, pipe = [sys.executable, str(Path(__file__).with_name("soak_zygote.py"))], subprocess.PIPE
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=environment(), text=True, bufsize=1)
        self._lock, self._started = threading.Lock(), queue.SimpleQueue[Process]()
        self._alive: dict[int, Process] = {}
        self._closed = False
        threading.Thread(target=self._listen, daemon=True).start()
        self._started.get(timeout=LIMIT)  # it has imported all

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            message = json.loads(line)
            if "code" not in message:
                self._alive[message["pid"]] = process = Process(message["pid"])
                self._started.put(process)
            else:
                ended = self._alive.pop(message["pid"])
                ended.code = message["code"]
                ended.ended.set()
        if not self._closed:  # nobody would hear of the ends of trainings: no verdict is possible
            print("soak: the process that starts trainings has ended; nothing after this counts", flush=True)
            os._exit(1)

    def start(self, argv: list[str], env: dict[str, str], out: Path) -> Process:
        assert self._process.stdin
        with self._lock:
            self._process.stdin.write(json.dumps({"argv": argv, "env": env, "out": str(out)}) + "\n")
            return self._started.get(timeout=LIMIT)

    def close(self) -> None:
        """Ends it, and what it started."""
        assert self._process.stdin
        self._closed = True
        self._process.stdin.close()
        self._process.wait()


class Job:
    """The processes of one run, started again after each fault. hangs: commands that did not end in LIMIT."""

    def __init__(self, method: Method, run: Path, data: Path, zygote: Zygote) -> None:
        self.method, self.run, self.data, self.hangs, self._zygote = method, run, data, 0, zygote
        self.processes: list[Process] = []
        self._notes = ""
        self._files: list[Path] = []

    def start(self) -> None:
        """Starts the command, unless it runs."""
        if self.processes:
            return
        self.run.parent.mkdir(parents=True, exist_ok=True)
        env = environment()
        if self.method.processes > 1:
            with create_server(("localhost", 0)) as server:
                env["JAX_COORDINATOR_ADDRESS"] = f"localhost:{server.getsockname()[1]}"
            env["JAX_NUM_PROCESSES"] = str(self.method.processes)
        for i in range(self.method.processes):
            self._files.append(self.data.parent / f"out-{self.method.name}-{len(self._files)}.txt")
            self._files[-1].parent.mkdir(parents=True, exist_ok=True)
            self._files[-1].touch()
            one = env | {"JAX_PROCESS_ID": str(i)} if self.method.processes > 1 else env
            argv = command(self.method, self.run, self.data)
            self.processes.append(self._zygote.start(argv, one, self._files[-1]))

    def wait(self) -> list[int]:
        """Starts the command if need be, and returns its exit codes. One that hangs is killed, and counted."""
        self.start()
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            if not process.ended.wait(max(deadline - time.monotonic(), 0.1)):
                self.hangs += 1
                process.signal(signal.SIGKILL)
                process.ended.wait()
        codes = [process.code or 0 for process in self.processes]
        self.processes.clear()
        return codes

    def running(self) -> bool:
        return not any(process.ended.is_set() for process in self.processes)

    def step(self) -> int:
        """Returns the number of lines of metrics so far."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def states(self) -> list[Path]:
        """Returns the folders of complete states, the newest last."""
        found = [path for path in (self.run / "checkpoints").glob("*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def finished(self) -> bool:
        return not self.processes and (self.run / "model").exists()

    def output(self) -> str:
        return "".join(file.read_text() for file in self._files) + self._notes

    def note(self, output: str) -> None:
        """Adds the output of another process of this run."""
        self._notes += output

    def last_line(self) -> str:
        lines = [line for line in self.output().splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def tracebacks(self) -> list[str]:
        """Returns the last line of each traceback in the outputs."""
        found = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*(.*)", self.output(), re.MULTILINE)
        return [*found, *re.findall(r"^Fatal Python error.*", self.output(), re.MULTILINE)]


def make_data(folder: Path) -> None:
    """Writes three shards, a folder of classes, one with broken pictures, and a zoo of weights."""
    rng = np.random.default_rng(0)
    part = folder.with_name(f"{folder.name}.part")
    (part / "shards").mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(part / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(24):
                colour = rng.integers(0, 256, 3)
                contents = {"png": _picture(colour), "txt": f"red {colour[0] // 32} blue {colour[2] // 32}".encode()}
                for extension, data in contents.items():
                    info = tarfile.TarInfo(f"{24 * shard + i:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for name in ("classes", "broken"):
        for i in range(60):
            file = part / name / "abc"[i % 3] / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            broken = name == "broken" and i in (7, 31)
            file.write_bytes(b"\x89PNG no more" if broken else _picture(rng.integers(0, 256, 3)))
    zoo = ("--net.features", "8", "--members", "64", "--chunk", "64", "--fit.steps", "5")
    argv = [sys.executable, "-m", "heirloom.common.cli", "train", "weightgen/smoke", "--run", str(part / "zoo"), *zoo]
    subprocess.run(argv, env=environment(), check=True, stdout=subprocess.DEVNULL)
    part.rename(folder)


def _picture(colour: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 24), tuple(int(c) for c in colour)).save(out, "PNG")
    return out.getvalue()


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """Yields a new folder; with a size, on a tmpfs of that many bytes."""
    folder.mkdir(parents=True)
    if not size:
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def may_mount() -> bool:
    """Returns whether this process may mount a tmpfs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        how = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", folder]
        if os.geteuid() or subprocess.run(how, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True
