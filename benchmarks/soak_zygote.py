"""Starts trainings by fork, so that each does not import for seconds: a process of `soak.py`.

Reads a line of JSON for each training to start, `{"argv", "env", "out"}`, and answers `{"pid"}`; when one has ended, it
says `{"pid", "code"}`. It runs one thread and opens no device, so that a fork is as good as a new process. When its
input ends, it ends its trainings and itself.
"""

import json
import os
import select
import signal
import sys
import warnings


def serve() -> tuple[list[str], dict[str, str]] | None:
    """Serves until the input ends, and returns None; in a forked process returns what to run."""
    alive: set[int] = set()
    with open(0, "rb", buffering=0, closefd=False) as requests:
        buffer = b""
        while True:
            ready = select.select([requests], [], [], 0.01)[0]
            while alive:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                alive.discard(pid)
                _say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
            if not ready:
                continue
            if not (data := requests.read(2**16)):
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                return None
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                request = json.loads(line)
                if not (pid := os.fork()):
                    _redirect(request["out"])
                    return request["argv"], request["env"]
                alive.add(pid)
                _say({"pid": pid})


def _say(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _redirect(file: str) -> None:
    out, nothing = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.open(os.devnull, os.O_RDONLY)
    for number, source in enumerate((nothing, out, out)):
        os.dup2(source, number)


def imported() -> None:
    """Imports what trainings import, and starts nothing."""
    from heirloom.common import cli, config

    for name in ("tinyclip/smoke", "lit/smoke", "learngene/smoke", "weightgen/generator"):
        config.load(name, [], "train")
    from heirloom.common.checkpoint import state
    from heirloom.common.train import bucket, recipe

    assert cli and state and bucket and recipe


if __name__ == "__main__":
    imported()
    warnings.filterwarnings("ignore", "os.fork")  # jax, which has started no thread yet
    _say({"pid": os.getpid()})
    if found := serve():
        argv, env = found
        os.environ.clear()
        os.environ.update(env)
        from heirloom.common.cli import main

        sys.exit(main(argv))
