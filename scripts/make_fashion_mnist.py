"""Fashion-MNIST as arrays for `data.path`: train/ and test/ with {image,label}.npy, grey in three channels.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb package      # 31 MB
    python scripts/make_fashion_mnist.py package data/fashion_mnist

Fashion-MNIST is by Zalando Research (Xiao, Rasul and Vollgraf 2017), MIT.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

SPLITS = {"train": "train", "test": "t10k"}
HEADER = {"images-idx3": 16, "labels-idx1": 8}  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("destination", type=Path)
    args = parser.parse_args()
    for split, name in SPLITS.items():
        image, label = (read(args.package, f"{name}-{kind}-ubyte.gz", header) for kind, header in HEADER.items())
        folder = args.destination / split
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "image.npy", np.repeat(image.reshape(-1, 28, 28, 1), 3, axis=3))
        np.save(folder / "label.npy", label.astype(np.int32))


def read(package: Path, name: str, header: int) -> np.ndarray:
    found = next(package.rglob(name), None)
    if found is None:
        sys.exit(f"{package}: has no {name}; unpack dataset-fashion-mnist there")
    return np.frombuffer(gzip.decompress(found.read_bytes()), np.uint8, offset=header)


if __name__ == "__main__":
    main()
