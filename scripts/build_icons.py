"""Builds `common/data/icons/icons.parquet`, the pictures of the small text-to-image models: `python
scripts/build_icons.py --cache DIR`.

Single-colour icons of Material Design Icons, each in ten named colours.
Needs `npm` on the path for a package that DIR does not hold yet (2 MB), and `pip install resvg_py`; takes seconds.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from build_emoji import contents, fetch

DESTINATION = Path(__file__).parents[1] / "common" / "data" / "icons" / "icons.parquet"
PACKAGE = ("@mdi/svg", "7.4.47")
SIZE, MARGIN = 64, 3
HELD_OUT = 3  # colours of each object that no training picture has
COLOURS = {
    "red": "#e53935",
    "orange": "#fb8c00",
    "yellow": "#fdd835",
    "green": "#43a047",
    "blue": "#1e88e5",
    "purple": "#8e24aa",
    "pink": "#f06292",
    "brown": "#6d4c41",
    "black": "#212121",
    "grey": "#9e9e9e",
}
# Icons whose name is the object, and others with the object that they show.
NAMES = (
    "airplane anchor axe balloon bat bed bell bicycle bird bomb bone boomerang bowl bridge broom brush bucket bus"
    " butterfly cactus cake camera candle car carrot castle cat church clover cow crown cube cup dog dolphin door"
    " duck egg elephant feather fish flag flower ghost glasses hammer heart helicopter horse horseshoe key kite"
    " ladder lamp leaf lighthouse lock magnet mushroom mustache owl paw pencil penguin phone pig pill pizza rabbit"
    " robot rocket shark sheep shield skull snail snake snowflake snowman square star sword tent tooth tree"
    " triangle trophy truck turtle umbrella"
)
OTHERS = {
    "circle": "circle",
    "fire": "flame",
    "food-apple": "apple",
    "home": "house",
    "lightning-bolt": "lightning bolt",
    "moon-waning-crescent": "moon",
    "sail-boat": "sailboat",
    "tshirt-crew": "shirt",
    "water": "drop",
    "white-balance-sunny": "sun",
}
WEBP: dict[str, Any] = {"format": "WEBP", "lossless": True, "method": 6, "quality": 100}
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("object", pa.string()),
        ("colour", pa.string()),
        ("split", pa.string()),
    ]
)


def draw(svg: str, colour: str) -> bytes:
    """Returns the icon in a colour on white, 64 x 64, as lossless WebP."""
    svg = svg.replace("<path ", f'<path fill="{colour}" ')
    side = SIZE - 2 * MARGIN
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))))
    picture = Image.new("RGBA", (SIZE, SIZE), "white")
    picture.alpha_composite(drawn.convert("RGBA"), (MARGIN, MARGIN))
    out = io.BytesIO()
    picture.convert("RGB").save(out, **WEBP)
    return out.getvalue()


def held_out(thing: str) -> list[str]:
    """Returns the colours of an object that are left for the test."""
    return sorted(COLOURS, key=lambda colour: hashlib.sha256(f"icons-1 {colour} {thing}".encode()).digest())[:HELD_OUT]


def icons(cache: Path) -> list[dict[str, Any]]:
    """Returns the rows of the icons, each object in every colour."""
    objects = {name: name.replace("-", " ") for name in NAMES.split()} | OTHERS
    rows = []
    with fetch(*PACKAGE, cache) as package:
        for name, thing in sorted(objects.items(), key=lambda item: item[1]):
            svg = contents(package, f"package/svg/{name}.svg").read().decode()
            article = "an" if thing[0] in "aeiou" else "a"
            for colour, value in COLOURS.items():
                prompt = f"{colour} {thing}"
                first = f"{'an' if colour == 'orange' else 'a'} {prompt}"
                captions = [first, prompt, f"{article} {thing} in {colour}"]
                row = dict(image=draw(svg, value), caption=captions, prompt=first, object=thing, colour=colour)
                rows.append(row | {"split": "test" if colour in held_out(thing) else "train"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of downloaded packages")
    args = parser.parse_args()
    rows = icons(args.cache)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), DESTINATION, compression="zstd", row_group_size=256)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}
    print(f"{DESTINATION}: {counts}, {DESTINATION.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
