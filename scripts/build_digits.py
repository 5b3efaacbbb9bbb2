"""Builds `common/data/digits/digits.parquet`: `python scripts/build_digits.py sklearn/datasets/data/digits.csv.gz`.

The table is part of the wheel of scikit-learn: `pip download --no-deps scikit-learn`, then unzip it.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

DESTINATION = Path(__file__).parents[1] / "common" / "data" / "digits" / "digits.parquet"
TRAIN = 1500
INK = 16  # the darkest value of the table


def png(pixels: np.ndarray) -> bytes:
    """Ink 0 to 16 as a grey picture, dark on white."""
    out = io.BytesIO()
    Image.fromarray(np.round(255 * (1 - pixels / INK)).astype(np.uint8)).save(out, format="PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="digits.csv.gz: 64 values and a label a line")
    table = np.loadtxt(parser.parse_args().table, delimiter=",")
    columns = {
        "image": pa.array([png(row.reshape(8, 8)) for row in table[:, :64]], pa.binary()),
        "label": pa.array(table[:, 64].astype(np.int32)),
        "split": pa.array(["train" if i < TRAIN else "test" for i in range(len(table))]),
    }
    parquet.write_table(pa.table(columns), DESTINATION, compression="zstd")


if __name__ == "__main__":
    main()
