"""What it costs to convert and to inherit: time against a plain copy of the file, and memory above the start.

    python benchmarks/surgery.py --json benchmarks/results/surgery.json

The donor is a ViT-B/32 of random weights, 605 MB as transformers writes it. Every job runs in a process of its own,
three times, after imports and with the file in the page cache; the eight devices are fakes on the CPU. Conversions
include the SHA-256 of the source and wait for the disk, and so does the copy. Memory is anonymous (RssAnon: what mapped
files do not back), sampled every 2 ms; `above result` leaves out the parameters the job was asked for. The naive way
reads every tensor into memory, cuts there, and only then places the student. The bars are from a prototype, on another
day.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from benchmarks import bench
from heirloom.common.checkpoint.convert import COPY, convert, open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.weights import create_safetensors
from heirloom.common.mesh import MeshConfig, shardings, start
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Plan, Source, apply
from tinyclip_jax.inherit import manual
from tinyclip_jax.model import Clip
from tinyclip_jax.zoo import FAMILY, STUDENTS, VIT_B_32

STUDENT = STUDENTS["vit_61m_32"]
MB = 1e6


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, 2 GB (default: a temporary folder)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(JOBS[args.job][0], args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_donor(Path(folder) / "hf")
        rows = {}
        for name in JOBS:
            command = [sys.executable, __file__, "--job", name, "--folder", folder]
            runs = [
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                for _ in range(args.repeats)
            ]
            rows[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {
                "runs": [run["seconds"] for run in runs]
            }
            report(name, rows)
    made = bench.header(("jax", "flax", "numpy"), device=f"{bench.CPU}, {os.cpu_count()} cores")
    bench.write(args.json, made | {"rows": rows})


def report(name: str, rows: dict[str, dict[str, Any]]) -> None:
    if len(rows) == 1:
        print(
            f"{'job':<28}{'seconds':>9}{'of copy':>9}{'anonymous':>12}{'above result':>14}   bar: seconds, memory above"
            " the result"
        )
    row, ratio = rows[name], rows[name]["seconds"] / rows["copy of the file"]["seconds"]
    bar, verdict = 2 * rows["copy of the file"]["seconds"] + 2, ""
    if name in FILE_TO_FILE:
        verdict = f"   {'meets' if row['seconds'] <= bar else 'MISSES'} twice the copy plus 2 s ({bar:.1f} s)"
    memory = f"{row['peak'] / MB:>9.0f} MB{(row['peak'] - row['result']) / MB:>11.0f} MB"
    print(f"{name:<28}{row['seconds']:>9.2f}{ratio:>8.1f}x{memory}   {JOBS[name][1]}{verdict}", flush=True)


def measure(job: Callable[[Path], int], folder: Path) -> dict[str, float]:
    """Seconds, peak anonymous bytes above the start, and bytes of the result that stay in memory."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))
    (folder / "hf" / "model.safetensors").read_bytes()  # into the page cache
    peak, done, before = 0, threading.Event(), anonymous()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    result = job(folder)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak": float(peak), "result": float(result)}


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def make_donor(folder: Path) -> None:
    """A ViT-B/32 of random weights as transformers writes it."""
    format, rng = FAMILY.format("hf"), np.random.default_rng(0)
    folder.mkdir()
    tensors = format.layout_of(VIT_B_32).foreign(functional(Clip, VIT_B_32).spec)
    with create_safetensors(folder / format.file, tensors) as out:
        for tensor in out.values():
            tensor[...] = 0.02 * rng.standard_normal(tensor.shape, np.float32)
    format.write_config(VIT_B_32, folder)


def donor(folder: Path) -> Donor:
    return open_donor(folder / "hf", [FAMILY])


def copy(folder: Path) -> int:
    shutil.copyfile(folder / "hf" / "model.safetensors", folder / "copy")
    with (folder / "copy").open("rb+") as file:
        os.fsync(file.fileno())
    return 0


def to_ours(folder: Path) -> int:
    convert(donor(folder), folder / "ours", "heirloom", force=True, verify=False)
    return 0


def to_hf(folder: Path) -> int:
    convert(open_donor(folder / "ours", [FAMILY]), folder / "back", "hf", force=True, verify=False)
    return 0


def place(spec: Any) -> dict[str, NamedSharding]:
    return shardings(spec, start(MeshConfig(data=1, fsdp=8)))


def sharded(plan: Plan, source: Source, cfg: Any) -> int:
    model = functional(Clip, cfg)
    params = graft(plan, source, model.spec, place(model.spec), lambda **kw: model.init(jax.random.key(0), **kw))
    return held(jax.block_until_ready(params))


def held(params: dict[str, jax.Array]) -> int:
    return sum(shard.data.nbytes for value in params.values() for shard in value.addressable_shards)


def to_devices(folder: Path) -> int:
    return sharded(COPY, donor(folder).source, VIT_B_32)


def student(folder: Path) -> int:
    return sharded(manual(VIT_B_32, STUDENT), donor(folder).source, STUDENT)


def naive(folder: Path) -> int:
    opened, model = donor(folder), functional(Clip, STUDENT)
    everything = Source(opened.source.spec, {path: np.asarray(view) for path, view in opened.source.values.items()})
    rules = tuple(rule for rule in manual(VIT_B_32, STUDENT).rules if rule[0] != "logit_scale")
    cut = apply(Plan(rules), everything, {path: leaf for path, leaf in model.spec.items() if path != "logit_scale"})
    cut |= model.init(jax.random.key(0), ["logit_scale"])
    params = jax.device_put(cut, place(model.spec))
    return held(jax.block_until_ready(params))


FILE_TO_FILE = ("HF -> ours", "ours -> HF")
JOBS: dict[str, tuple[Callable[[Path], int], str]] = {
    "copy of the file": (copy, ""),
    "HF -> ours": (to_ours, "0.8-3.7 s, none"),
    "ours -> HF": (to_hf, "0.7-2.8 s, none"),
    "HF -> 8 devices": (to_devices, "1.7-4 s, 96-130 MB"),
    "B/32 -> 61M on 8 devices": (student, "1.4-2.7 s, 90-130 MB"),
    "the same, naively": (naive, "1,490 MB in all"),
}

if __name__ == "__main__":
    main()
