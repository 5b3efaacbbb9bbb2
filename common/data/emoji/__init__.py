"""1,607 emoji drawn by three hands: a complete image-text set that lives in the repository.

One parquet file per style, `noto`, `fluent` and `twemoji`, one row per picture, rows in the order of `concept`:

    image     binary        WebP, 64x64, RGB, composited on white
    caption   string        English name, unique per concept ("hot air balloon" is not "balloon")
    tags      list<string>  English keywords, some ten each, in alphabetical order
    concept   string        code points, lower-case hex joined by "-", without the variation selector fe0f
    style     string        noto | fluent | twemoji
    group     string        CLDR group, such as "animals-nature"
    subgroup  string        CLDR subgroup, such as "animal-mammal"
    split     string        train | test

The split is by concept and the same in every style: 300 concepts are `test`, and no picture of them, in any hand, is
`train`. Variants of one motif (man, woman and person running; thumbs up and down) stay on one side; families of more
than eight, such as the clock faces, are always `train`. Colour is not counted as a variant, so the green heart may be
held out while the red one is seen. `scripts/build_emoji.py` makes the files; LICENSES.md says whose pictures these are.
"""

from pathlib import Path

STYLES = ("noto", "fluent", "twemoji")


def path(style: str) -> Path:
    """The parquet file of one style."""
    if style not in STYLES:
        raise ValueError(f"no emoji style {style!r}; there are {', '.join(STYLES)}")
    return Path(__file__).parent / f"{style}.parquet"
