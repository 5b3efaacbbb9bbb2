"""Tar shards at scale: time, bytes and memory of the index, and how soon a training has its first batch.

    python benchmarks/index.py --json benchmarks/results/index.json
    python benchmarks/index.py --samples 2000 --shards 20               # small

Writes --samples tiny samples (a picture of 16 x 16 and a caption) in shards of 10,000, and --shards shards of one
sample: what opening costs depends on the number of shards alone, and 40,000 shards of 10,000 are 400 million samples.
Each is indexed, then opened again in a process of its own, from the disk's cache.
"""

import argparse
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import bench

BLOCK, BATCH, BATCHES = 512, 256, 12
PER_SHARD = 10_000
SHARED = "the machine was shared with other work: times are upper bounds"


def picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(out, "JPEG")
    return out.getvalue()


def member(name: bytes, data: bytes) -> bytes:
    """Returns a ustar header and the bytes of a member; tarfile would take longer than the index does."""
    header = bytearray(BLOCK)
    header[: len(name)] = name
    header[100:136] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(data)
    header[136:156] = b"00000000000\0" + b" " * 8
    header[156:157], header[257:265] = b"0", b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


def write_shards(folder: Path, shards: int, samples: int) -> None:
    """Writes shards of `samples` samples each."""
    folder.mkdir(parents=True)
    data = picture()
    for shard in range(shards):
        with open(folder / f"{shard:06d}.tar", "wb", buffering=2**20) as out:
            for i in range(shard * samples, (shard + 1) * samples):
                out.write(member(b"%09d.jpg" % i, data) + member(b"%09d.txt" % i, b"picture %d" % i))
            out.write(bytes(2 * BLOCK))


def child(*words: object) -> dict[str, Any]:
    """Runs a measurement in a process of its own."""
    argv = [sys.executable, __file__, "--measure", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, folder: Path, workers: int, first: int) -> dict[str, Any]:
    """Runs in the child."""
    from heirloom.common.data.catalogue import catalogued
    from heirloom.common.data.pipeline import PipelineConfig, training_batches
    from heirloom.common.data.sources import SourceConfig, open_source

    began, used = time.perf_counter(), cpu()
    if what == "index":
        found = catalogued(sorted(folder.glob("*.tar")))
        seconds = time.perf_counter() - began
        peak = {"main": resource.RUSAGE_SELF, "workers": resource.RUSAGE_CHILDREN}
        memory = {name: resource.getrusage(who).ru_maxrss / 1024 for name, who in peak.items()}
        return {"samples": int(found.samples.sum()), "seconds": seconds, "cpu_s": cpu() - used, "memory_mb": memory}
    source = open_source(SourceConfig(str(folder)))
    opened = time.perf_counter() - began
    if what == "open":
        return {"samples": len(source), "seconds": opened, "cpu_s": cpu() - used, "memory_mb": memory_of("self")}
    batches = training_batches(source, PipelineConfig(batch=BATCH, workers=workers), example)
    if first:
        batches.restore(batches.state() | {"batches": first})
    next(batches)
    out: dict[str, Any] = {"opened_s": opened, "first_batch_s": time.perf_counter() - began}
    out["first_batch_cpu_s"] = cpu() - used
    began, used = time.perf_counter(), cpu()
    for _ in range(BATCHES):
        next(batches)
    out["examples_per_s"] = BATCH * BATCHES / (time.perf_counter() - began)
    out["us_of_cpu_per_example"] = 1e6 * (cpu() - used) / (BATCH * BATCHES)
    children = Path("/proc/self/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    out |= {"memory_mb": memory_of("self"), "workers_memory_mb": [memory_of(pid) for pid in pids]}
    batches.close()
    return out


def example(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    image = np.asarray(Image.open(io.BytesIO(record["image"])))
    return {"image": image, "length": np.int32(len(record["text"]))}


def cpu() -> float:
    """Returns the seconds of CPU that this process used, and those of its children that have ended."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def memory_of(pid: str) -> float:
    """Returns the resident memory of a process in MB, without pages of files that it has mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024, 1)


def index_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".tar")


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=40_000, help="of one sample")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare batches")
    parser.add_argument("--folder", type=Path, help="where shards are written (default: a temporary folder)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder, workers, first = args.measure
        print(json.dumps(measure(what, Path(folder), int(workers), int(first))))
        return
    per_shard = min(PER_SHARD, args.samples)
    place = args.folder or Path(tempfile.mkdtemp(prefix="heirloom-index-"))
    try:
        large, many = place / "large", place / "many"
        write_shards(large, args.samples // per_shard, per_shard)
        indexed = child("index", large, 0, 0)
        samples = indexed["samples"]
        indexed |= {"us_per_sample": 1e6 * indexed["seconds"] / samples, "us_of_cpu": 1e6 * indexed["cpu_s"] / samples}
        indexed["bytes_per_sample"] = index_bytes(large) / samples
        middle = samples // BATCH // 2
        result = {"note": SHARED, "samples": samples, "shards": samples // per_shard, "index": indexed}
        result["reopen"] = child("open", large, 0, 0)
        for workers in (0, args.workers):
            result[f"start_{workers}_workers"] = child("batches", large, workers, 0)
            result[f"resume_{workers}_workers"] = child("batches", large, workers, middle)
        write_shards(many, args.shards, 1)
        result["many_shards"] = {"shards": args.shards, "index": child("index", many, 0, 0)}
        result["many_shards"]["reopen"] = child("open", many, 0, 0)
    finally:
        if not args.folder:
            shutil.rmtree(place)
    print(json.dumps(result, indent=1))
    bench.write(args.json, bench.header(("numpy", "grain")) | result)


if __name__ == "__main__":
    main()
