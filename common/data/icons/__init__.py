"""1,000 small pictures with captions, for text to image: icons in named colours.

    image     binary        WebP, 64x64, RGB, on white
    caption   list<string>  ways to say it: "a red apple", "red apple", "an apple in red"
    prompt    string        the first of them
    object    string        "apple"
    colour    string        red, orange, yellow, green, blue, purple, pink, brown, black or grey
    split     string        train | test

Of each of 100 objects three colours are `test`: the object and the colour are known from other pictures, and no
training picture shows both together. `scripts/build_icons.py` makes the file; LICENSES.md says whose pictures these
are.
"""

from pathlib import Path

PATH = Path(__file__).parent / "icons.parquet"
