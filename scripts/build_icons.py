"""Builds `common/data/icons/icons.parquet`, the pictures of the small text-to-image models: `python
scripts/build_icons.py --cache DIR`.

Single-colour icons of Material Design Icons, each in ten named colours, and the embedded Noto emoji that show things.
Needs `npm` on the path for a package that DIR does not hold yet (2 MB), and `pip install resvg_py`; takes seconds.
"""

import argparse
import hashlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from build_emoji import contents, fetch

from heirloom.common.data import emoji

DESTINATION = Path(__file__).parents[1] / "common" / "data" / "icons" / "icons.parquet"
PACKAGE = ("@mdi/svg", "7.4.47")
SIZE, MARGIN = 64, 3
HELD_OUT = 2  # colours of each object that no training picture has
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
    "abacus airplane alarm alien ambulance anchor axe baguette balloon barrel baseball basket bat bathtub battery bed"
    " bee beer bell bench bicycle bird bomb bone book boomerang bowl bridge briefcase broom brush bucket bus butterfly"
    " cactus cake camera candle candy car carrot castle cat cheese church cloud clover coffee compass cookie corn cow"
    " crane crown cube cup cupcake dog dolphin donkey door duck egg elephant factory fan feather fish flag flashlight"
    " flower football fountain ghost gift glasses gondola hamburger hammer heart helicopter horse horseshoe"
    " jellyfish kangaroo kettle key kite knife koala ladder ladybug lamp laptop leaf lighthouse lipstick lock magnet"
    " mailbox microphone microscope mosque mushroom mustache needle owl palette panda parachute paw pen pencil penguin"
    " phone piano pig pill pizza pot pretzel printer pumpkin purse puzzle rabbit radio ribbon robot rocket"
    " ruler satellite saxophone scooter screwdriver shark sheep shield shower skateboard skull snail snake"
    " snowflake snowman sofa spade spider square star stethoscope store sunglasses sword table taco teddy-bear"
    " telescope television tent thermometer tooth toothbrush tractor train tree triangle trophy truck trumpet turtle"
    " umbrella unicorn violin volcano watch wheelchair whistle wrench"
)
OTHERS = {
    "bottle-wine": "wine bottle",
    "chef-hat": "chef hat",
    "chess-king": "chess king",
    "chess-rook": "chess rook",
    "circle": "circle",
    "diamond-stone": "diamond",
    "ferris-wheel": "ferris wheel",
    "fire": "flame",
    "fire-truck": "fire truck",
    "flower-tulip": "tulip",
    "food-apple": "apple",
    "fruit-cherries": "cherries",
    "fruit-grapes": "grapes",
    "fruit-pear": "pear",
    "fruit-pineapple": "pineapple",
    "fruit-watermelon": "watermelon",
    "glass-cocktail": "cocktail glass",
    "glass-wine": "wine glass",
    "guitar-acoustic": "guitar",
    "hand-back-left": "hand",
    "hard-hat": "hard hat",
    "hat-fedora": "hat",
    "home": "house",
    "ice-cream": "ice cream",
    "leaf-maple": "maple leaf",
    "lightning-bolt": "lightning bolt",
    "moon-waning-crescent": "moon",
    "palm-tree": "palm tree",
    "pine-tree": "pine tree",
    "sail-boat": "sailboat",
    "shoe-heel": "high heel",
    "shoe-sneaker": "sneaker",
    "tea": "tea cup",
    "traffic-light": "traffic light",
    "treasure-chest": "treasure chest",
    "tshirt-crew": "shirt",
    "water": "drop",
    "white-balance-sunny": "sun",
    "wizard-hat": "wizard hat",
}
GROUPS = {"animals-nature", "food-drink", "activities", "objects", "travel-places"}
SERIES = re.compile(r".*(o.clock|-thirty)")  # clock faces, which only a reader of clocks tells apart
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


def noto() -> list[dict[str, Any]]:
    """Returns the rows of the emoji: of each thing one, with its own colours."""
    kept = []
    for row in pq.read_table(emoji.path("noto")).to_pylist():
        if row["group"] in GROUPS and row["split"] == "train" and not SERIES.match(row["caption"]):
            captions = [row["caption"], f"{row['caption']} emoji"]
            kept.append(
                dict(image=row["image"], caption=captions, prompt=row["caption"], object="", colour="", split="train")
            )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of downloaded packages")
    args = parser.parse_args()
    rows = icons(args.cache) + noto()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), DESTINATION, compression="zstd", row_group_size=256)
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "test")}
    print(f"{DESTINATION}: {counts}, {DESTINATION.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
