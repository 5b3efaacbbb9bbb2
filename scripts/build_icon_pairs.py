"""Builds a wider set than the embedded emoji: `python scripts/build_icon_pairs.py --cache DIR --out FILE`.

Three kinds of pictures: other hands' emoji and the colour icon sets of npm's `@iconify/json`, single-colour sets of the
same package drawn in one dark colour each, and Debian's Open Clip Art. The licence of every set is read from its own
record and has to be permissive; nothing non-commercial, ShareAlike or GPL gets in.

The file has the schema of `common/data/emoji`, with `concept` the normalised caption, `style` the set, empty groups and
`split` "train" throughout. It is made for training beside that set, so whatever names one of its held-out concepts is
left out, and counted. Needs `npm` and `apt-get`/`dpkg-deb` on the path for packages that DIR does not hold yet (260
MB). Takes a minute or two on two cores.
"""

import argparse
import collections
import hashlib
import io
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from build_emoji import CAPTIONS, SCHEMA, concept, family, fetch, names, webp

from heirloom.common.data import emoji

ICONIFY = ("@iconify/json", "2.2.535")
CLIPART = {"openclipart-svg": "1:0.18+dfsg-19", "openclipart-png": "1:0.18+dfsg-19"}
PERMISSIVE = {"MIT", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "ISC", "BSD-3-Clause", "OFL-1.1"}

# No Twemoji and Noto, as the embedded set has those very drawings; openmoji and emojione-v1 are ShareAlike.
EMOJI = ["emojione", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "noto-v1", "streamline-emojis"]
# The other colour sets are logos, flags and file types of programs: trademarks, or signs without a describable content.
COLOUR = [
    "flat-color-icons", "flat-ui", "fluent-color", "glyphs-poly", "icon-park", "marketeq", "meteocons",
    "streamline-color", "streamline-cyber-color", "streamline-flex-color", "streamline-freehand-color",
    "streamline-kameleon-color", "streamline-plump-color", "streamline-sharp-color", "streamline-stickies-color",
    "streamline-ultimate-color",
]  # fmt: skip
# Single-colour sets that draw things rather than controls.
INK = ["game-icons", "healthicons", "maki", "mdi", "ph", "tabler", "temaki", "wi"]
INKS = ["#1f2933", "#7b1e3a", "#0b5394", "#1e6b3a", "#b45f06", "#5b2a86", "#0f766e", "#a61c1c"]
PER_CAPTION = {"emoji": 1, "colour": 4, "ink": 1, "clipart": 4}

# Last words that tell a drawing from its siblings; those of the second kind only where the name without them exists
# too, as a traffic light is not a kind of traffic.
VARIANT = {"one", "two", "three", "four", "five", "duo", "outline", "outlined", "filled", "duotone", "alt", "variant"}
SOMETIMES = {"flat", "fill", "bold", "thin", "light", "solid"}
LETTERS = {
    "alpha",
    "letter",
    "numeric",
    "number",
    "roman",
    "alphabet",
    "zodiac",
    "format",
    "regional",
    "digit",
    "cjkunifiedideograph",
}
BRANDS = frozenset(
    """
    adobe airbnb aliexpress alipay amazon android aws azure baidu behance bilibili bing bitcoin blogger bluetooth brand
    bytedance chrome codepen cpanel deezer devpost discord disqus docker dribbble dribble dropbox drupal ebay ethereum etsy
    evernote facebook figma firefox flickr github gitlab gmail google imac imdb instagram ios ipad iphone ipod java
    javascript jira kickstarter lastfm linkedin linux litecoin logo macbook mastercard mastodon messenger microsoft mozilla
    netflix nintendo nodejs npm onedrive paypal photoshop php pinterest playstation qq quora react reddit sass shopify skype
    slack snapchat soundcloud spotify squarespace stackoverflow teamspeak telegram tiktok tinder torrent trello tumblr tux
    twitch twitter typescript uber ubuntu unreal unsplash viber vimeo visa vk wechat weibo whatsapp wikipedia wordpress xbox
    xing yahoo yandex yelp youtube zhihu
    """.split()  # noqa: SIM905
)

# Folders of Open Clip Art whose pictures do not match their names, or are flags, logos or unlicensed themes.
CLIPART_OUT = (
    "shapes/stars/", "shapes/jigsaw/", "shapes/flowchart/", "recreation/games/cards/", "special/", "logos/",
    "unsorted/duplicates/", "signs_and_symbols/flags/", "signs_and_symbols/led/", "computer/icons/",
)  # fmt: skip
CLIPART_NOISE = re.compile(
    r"(?i)^hotel icon\b|clip ?art.*? - |^part of .*|\bhash 0x\w+|\b0x\w+|\((b and w|bw|color|colour)\)|\bicon theme\b|\brpg map elements?\b"
)
KEYWORDS_OUT = {"hash", "unsorted", "icon", "icons", "theme", "mapsym", "networksym", "shape", "symbol", "menu"}
PUBLIC_DOMAIN = re.compile(rb'<(?:\w+:)?license\s+rdf:resource="[^"]*/publicdomain/?"', re.IGNORECASE)


class Job(NamedTuple):
    """One picture to draw. source: SVG text or PNG path. kind: a key of PER_CAPTION. alias: its other name."""

    kind: str
    style: str
    caption: str
    tags: tuple[str, ...]
    source: str | Path
    alias: str = ""


def words(text: str) -> tuple[str, ...]:
    return tuple(
        re.findall(
            r"[a-z0-9]+",
            text.lower().replace("\u2019", "").replace("'", "").replace("\u00f1", "n").replace("blonde", "blond"),
        )
    )


def stem(word: str) -> str:
    """Enough of a stem for "cherries" to meet "cherry" and "glasses" "glass"."""
    for end, put in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(end) and len(word) > len(end) + 1:
            return word[: -len(end)] + put
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def stems(text: str) -> tuple[str, ...]:
    return tuple(stem(word) for word in words(text))


def within(phrase: tuple[str, ...], text: tuple[str, ...]) -> bool:
    return any(text[i : i + len(phrase)] == phrase for i in range(len(text) - len(phrase) + 1))


class HeldOut:
    """Knows whether a caption names a held-out concept.

    A caption does if it contains the concept's name, or is two or more words of it, or equals or contains one of its
    nicknames (chat shortcodes: "car" for "automobile"). A one-word nickname that is also part of a training name
    (police car) only counts when it is all of the caption. Words are compared by stem, and with their spaces removed
    too.
    """

    def __init__(self, nicknames: dict[str, set[str]]):
        rows = pq.read_table(emoji.path("noto"), columns=["concept", "caption", "split"]).to_pylist()
        held = [row for row in rows if row["split"] == "test"]
        seen = {word for row in rows if row["split"] == "train" for word in stems(row["caption"])}
        motifs = {stems(family(row["caption"])) for row in held}
        self.names = {stems(row["caption"]) for row in held} | {motif for motif in motifs if len(motif) > 1}
        also = {stems(name) for row in held for name in nicknames.get(row["concept"], ())} - self.names
        self.inside = self.names | {
            name for name in also if len(name) > 1 or (len(name[0]) > 1 and name[0] not in seen)
        }
        self.joined = {"".join(name) for name in self.names | also}
        self.joined_inside = {"".join(name) for name in self.inside if len(name) > 1}

    def named_by(self, caption: str) -> bool:
        found = stems(caption)
        return (
            "".join(found) in self.joined
            or any(word in self.joined_inside for word in found)
            or any(within(name, found) for name in self.inside)
            or (len(found) > 1 and any(within(found, name) for name in self.names))
        )


def shortcodes(cache: Path) -> dict[str, set[str]]:
    """concept -> its nicknames in the six shortcode lists of emojibase."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    with fetch(*CAPTIONS, cache) as tar:
        for preset in ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels"):
            for code, codes in json.load(tar.extractfile(f"package/en/shortcodes/{preset}.json")).items():
                spoken = [
                    re.sub(r"[_-]|\d+$", " ", one).strip() for one in ([codes] if isinstance(codes, str) else codes)
                ]
                found[concept(code)].update(one for one in spoken if words(one))
    return found


def iconify(cache: Path):
    """Jobs of every Iconify set above, not yet filtered by caption."""
    known = names(cache)
    spelled: dict[str, dict] = {}
    for code, nicknames in shortcodes(cache).items():
        spelled |= {"".join(words(name)): known[code] for name in nicknames if code in known}
    spelled |= {"".join(words(row["caption"])): row for row in known.values()}  # a name outranks a nickname
    with fetch(*ICONIFY, cache) as tar:
        record = json.load(tar.extractfile("package/collections.json"))
        for member in tar:
            style = Path(member.name).stem
            kind = next(
                (kind for kind, sets in (("emoji", EMOJI), ("colour", COLOUR), ("ink", INK)) if style in sets), None
            )
            if kind is None or not member.name.startswith("package/json/"):
                continue
            if (spdx := record[style]["license"]["spdx"]) not in PERMISSIVE:
                raise ValueError(f"icon set {style} is under {spdx}, which is not on the list; take the set out")
            icons = json.load(tar.extractfile(member))
            branded = {
                name
                for category, of in icons.get("categories", {}).items()
                if re.search("(?i)brand|logo", category)
                for name in of
            }
            for name in sorted(icons["icons"], key=lambda name: (size_rank(name), name)):
                row = None
                if kind == "emoji":  # "astronaut-2" is an astronaut, but a "keycap-2" is itself
                    row = spelled.get("".join(words(name))) or spelled.get("".join(words(spoken(name))))
                if (
                    icons["icons"][name].get("hidden")
                    or name in branded
                    or (kind == "emoji" and not row and not speaks(name, icons["icons"]))
                ):
                    continue
                caption, tags = (row["caption"], row["tags"]) if row else (spoken(name, icons["icons"]), ())
                yield Job(kind, style, caption, tuple(tags), svg(icons, name, kind))


def size_rank(name: str) -> int:
    """Draws the largest of "home-16", "home-48" first, for the limit per caption to keep."""
    size = re.search(r"-(12|16|20|24|28|32|48)$", name)
    return -int(size[1]) if size else 0


def speaks(name: str, icons: dict) -> bool:
    """Whether the name of an unlisted emoji is worth its words: no skin tone, flag or words run together."""
    tone = re.search(r"^(.*?)(-(medium-)?(light|medium|dark))+(-skin-tone.*)?$", name)
    return (
        "-" in name and "tone" not in words(name) and not name.startswith("flag-") and not (tone and tone[1] in icons)
    )


def spoken(name: str, siblings: Collection[str] = ()) -> str:
    """`briefcase-check-2-duo` -> "briefcase check"."""
    found = list(words(name))
    while found and (
        found[-1].isdigit() or found[-1] in VARIANT or (found[-1] in SOMETIMES and "-".join(found[:-1]) in siblings)
    ):
        found.pop()
    return " ".join(found)


def svg(icons: dict, name: str, kind: str) -> str:
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, usual))
        for key, usual in zip(("left", "top", "width", "height"), (0, 0, 16, 16), strict=True)
    )
    ink = INKS[hashlib.sha256(name.encode()).digest()[0] % len(INKS)] if kind == "ink" else INKS[0]
    edge = max(width, height)  # a square canvas, the picture in its middle
    box = f"{left - (edge - width) / 2} {top - (edge - height) / 2} {edge} {edge}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="64" '
        f'viewBox="{box}" color="{ink}">{icon["body"]}</svg>'
    )


def clipart(cache: Path):
    """Jobs of Open Clip Art: the PNG of every SVG whose own metadata dedicates it to the public domain."""
    root = cache / "openclipart"
    if not (root / "done").exists():
        for package, version in CLIPART.items():
            if not (debs := sorted(cache.glob(f"{package}_*.deb"))):
                subprocess.run(["apt-get", "download", f"{package}={version}"], check=True, cwd=cache)
                debs = sorted(cache.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(debs[-1]), str(root)], check=True)
        (root / "done").touch()
    base = root / "usr/share/openclipart"
    entries = []
    for file in sorted((base / "svg").rglob("*.svg")):
        text = file.read_bytes()
        png = base / "png" / file.relative_to(base / "svg").with_suffix(".png")
        # Rollandin is one prolific author whose titles are Italian.
        if PUBLIC_DOMAIN.search(text) and b"rollandin" not in text.lower() and png.exists():
            title = re.search(rb"<dc:title[^>]*>(.*?)</dc:title>", text, re.DOTALL)
            title = " ".join(words(CLIPART_NOISE.sub(" ", title[1].decode("ascii", "replace")))) if title else ""
            keywords = re.findall(rb"<rdf:li[^>]*>\s*([a-z][a-z ]{2,20})\s*</rdf:li>", text)
            entries.append((png, title, dict.fromkeys(k.decode() for k in keywords)))
    series = collections.Counter(title for _, title, _ in entries)
    for png, title, keywords in entries:
        if str(png.relative_to(base / "png")).startswith(CLIPART_OUT):
            continue
        # Files are called name_author_number. The title says it better, unless it is a stub or that of a whole series.
        name = spoken(re.sub(r"\d+$", "", re.sub(r"_[^_]+_\d+$", "", png.stem.removeprefix("aiga_"))))
        title = re.sub(r"\d+$", "", spoken(title))
        stub = (
            series[title] > 4
            or not title
            or re.search(r"clip ?art|theme|untitled|unnamed|\b(svg|drawing|quot|amp|icons)\b", title)
        )
        yield Job(
            "clipart",
            "openclipart",
            name if stub else title,
            tuple(k for k in keywords if k not in KEYWORDS_OUT),
            png,
            name,
        )


def draw(source: str | Path) -> bytes | None:
    """The picture as WebP, or nothing where it is blank or cannot be drawn."""
    try:
        if isinstance(source, Path):
            picture = Image.open(source)
            if picture.width * picture.height > 16_000_000:  # a few posters, seconds each
                return None
            picture = picture.convert("RGBA")
            picture = picture.crop(picture.getbbox())  # clip art floats on a page
        else:
            picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=source, skip_system_fonts=True))).convert(
                "RGBA"
            )
    except (ValueError, OSError, Image.DecompressionBombError):
        return None
    data = webp(picture)
    seen = np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.int16)
    return data if np.ptp(seen) > 40 else None


def build(cache: Path, out: Path, workers: int) -> None:
    held_out = HeldOut(shortcodes(cache))
    dropped: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    kept: list[Job] = []
    per_caption: collections.Counter = collections.Counter()
    icons = list(iconify(cache))
    english = {word for job in icons for text in (job.caption, *job.tags) for word in stems(text)}
    for job in (*icons, *clipart(cache)):
        found = words(job.caption)
        spelled = english | {word for tag in job.tags for word in stems(tag)}
        if job.kind == "clipart" and 2 * sum(word in spelled for word in stems(job.caption)) < len(found):
            reason = "not English"
        elif not any(len(word) > 2 and word.isalpha() for word in found) or LETTERS & {*found} or len(found) > 12:
            reason = "letters, numbers"
        elif BRANDS & {*found}:
            reason = "brands"
        elif job.kind == "emoji" and found[0] == "flag":
            reason = "flags"
        elif any(held_out.named_by(name) for name in (job.caption, job.alias) if name) or (
            job.kind == "clipart" and any(stems(tag) in held_out.names for tag in job.tags)
        ):
            reason = "held out"
        elif per_caption[job.style, stems(job.caption)] >= PER_CAPTION[job.kind]:
            reason = "same caption"
        else:
            per_caption[job.style, stems(job.caption)] += 1
            kept.append(
                job._replace(tags=tuple(tag for tag in job.tags if job.kind == "emoji" or not held_out.named_by(tag)))
            )
            continue
        dropped[job.style][reason] += 1

    rows, drawn = [], set()
    with multiprocessing.Pool(workers) as pool:
        for job, data in zip(kept, pool.imap(draw, [job.source for job in kept], chunksize=64), strict=True):
            if data is None or (job.style, data) in drawn:
                dropped[job.style]["blank or twice"] += 1
                continue
            drawn.add((job.style, data))
            rows.append(
                {
                    "image": data,
                    "caption": job.caption,
                    "tags": list(job.tags),
                    "concept": " ".join(words(job.caption)),
                    "style": job.style,
                }
                | {"group": "", "subgroup": "", "split": "train"}
            )
    rows.sort(key=lambda row: (row["concept"], row["style"]))  # stable: equal ones stay in the order they were read
    compression = {field.name: "none" if field.name == "image" else "zstd" for field in SCHEMA}
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out, compression=compression, write_statistics=False)

    for style, count in collections.Counter(row["style"] for row in rows).most_common():
        print(
            f"{style:28}{count:6} kept; left out " + ", ".join(f"{n} {why}" for why, n in dropped[style].most_common())
        )
    leaks = sum(of["held out"] for of in dropped.values())
    print(
        f"{out}: {len(rows)} pictures, {len({row['concept'] for row in rows})} captions, {out.stat().st_size / 1e6:.1f} MB"
    )
    print(f"{leaks} pictures were left out because they name a held-out concept")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--out", type=Path, required=True, help="the parquet file to write")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build(args.cache, args.out, args.workers)
