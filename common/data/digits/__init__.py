"""1,797 handwritten digits of 8 x 8 pixels: labelled pictures that live in the repository.

One parquet file, one row per picture, in the order of the table they are from:

    image     binary   PNG, 8x8, grey, dark ink on white
    label     int32    0 to 9
    split     string   train (the first 1,500) | test (the last 297)

`scripts/build_digits.py` makes the file; LICENSES.md says whose pictures these are.
"""

from pathlib import Path

PATH = Path(__file__).parent / "digits.parquet"
