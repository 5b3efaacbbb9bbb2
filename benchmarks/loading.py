"""Seconds of a process to load pictures from tar shards: `python benchmarks/loading.py ours|webdataset FOLDER BATCHES`.

Both decode JPEG files, crop at random, resize to 224 px (bicubic) and normalise, in batches of 64. heirloom uses its
threads, torch's DataLoader as many worker processes as there are cores. Prints the seconds of BATCHES batches, after
four that do not count, as JSON.
"""

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH, SIZE, FIRST = 64, 224, 4
BICUBIC = Image.Resampling.BICUBIC


def write_shards(folder: Path, shards: int, pictures: int) -> None:
    """Writes tar shards of JPEG files of 500 x 375 pixels with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as out:
            for number in range(pictures):
                smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), BICUBIC)
                noisy = np.asarray(smooth, np.int16) + rng.integers(-16, 17, (375, 500, 3))
                file = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
                key = f"{shard:05}{number:05}"
                for name, data in ((f"{key}.jpg", file.getvalue()), (f"{key}.txt", b"a picture")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))


def ours(folder: Path) -> Iterator[Any]:
    from heirloom.common.data.pipeline import Augment, PipelineConfig, training_batches
    from heirloom.common.data.preprocess import Preprocess
    from heirloom.common.data.sources import SourceConfig, open_source

    source = open_source(SourceConfig(path=str(folder)))
    return iter(training_batches(source, PipelineConfig(batch=BATCH), Augment(Preprocess(size=SIZE), None, 0)))


class Transform:
    """Random crop of 90 to 100 % of the area, as `Preprocess`; a class, so that worker processes can get it."""

    mean, std = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], np.float32)

    def __call__(self, sample: tuple[Image.Image]) -> np.ndarray:
        picture, rng = sample[0].convert("RGB"), np.random
        area = rng.uniform(0.9, 1.0) * picture.width * picture.height
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(picture.width, np.sqrt(area * ratio))
        height = min(picture.height, np.sqrt(area / ratio))
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        pixels = np.asarray(picture.resize((SIZE, SIZE), BICUBIC, box=box), np.float32)
        return (pixels / 255 - self.mean) / self.std


def webdataset(folder: Path) -> Iterator[Any]:
    import torch
    import webdataset as wds

    files = sorted(map(str, folder.glob("*.tar")))
    data = wds.WebDataset(files, shardshuffle=len(files), nodesplitter=wds.split_by_node, seed=0)
    data = data.shuffle(256).decode("pil").to_tuple("jpg").map(Transform()).repeat()
    return iter(torch.utils.data.DataLoader(data, BATCH, num_workers=len(os.sched_getaffinity(0))))


def main() -> None:
    name, folder, batches = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    stream = {"ours": ours, "webdataset": webdataset}[name](folder)
    for _ in range(FIRST):
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        batch = next(stream)
    seconds = time.perf_counter() - started
    pixels = batch["image"] if name == "ours" else batch
    assert tuple(pixels.shape) == (BATCH, SIZE, SIZE, 3), pixels.shape
    print(json.dumps({"seconds": seconds}), flush=True)
    os._exit(0)  # the streams are endless: nothing waits for their threads and workers


if __name__ == "__main__":
    main()
