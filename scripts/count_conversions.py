"""Write docs/conversions.md: every model and format, both directions, with the largest error against the reference.

    python scripts/count_conversions.py            # needs the extra `parity`, timm and open_clip
    python scripts/count_conversions.py --check    # CI: the rows are those of the page, and no error is much larger

Models are small. Where the repository has a checkpoint that the library itself wrote (tests/golden), that one is read;
the others have drawn weights and are written by heirloom first. The reference is what `heirloom convert` compares with.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # read by jax when it is imported: compiling is most of it

import numpy as np
from torchvision_stand_in import installed

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.verify import OWN, TOLERANCE
from heirloom.common.methods import families
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import VitConfig
from lit_jax.dit import DitConfig
from lit_jax.pixart import PixArtConfig
from lit_jax.text.t5 import T5Config
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.resnet import ResNetConfig

with installed():
    import open_clip  # noqa: F401  (a reference, and so is timm: imported here because both need a torchvision)
    import timm  # noqa: F401

ROOT = Path(__file__).parents[1]
GOLDENS, PAGE = ROOT / "tests" / "golden", ROOT / "docs" / "conversions.md"
GROWTH, NOISE = 20, 1e-6  # an error may be this many times that of the page, or up to this: CPUs add in other orders
LIBRARIES = ("jax", "torch", "transformers", "diffusers", "timm", "open_clip_torch")

TEXT = TextConfig(context=12, vocab=64, width=64, layers=2, heads=1, hidden=96)
DIT = DitConfig(size=16, channels=3, width=32, layers=2, heads=2, hidden=48, classes=7)
PIXART: dict[str, Any] = dict(size=16, width=64, layers=2, heads=4, cross_heads=4, hidden=256, text_width=32)
PIXART |= dict(text_tokens=12, interpolation=0.5)
GENE: dict[str, Any] = dict(eps=1e-5, size=8, patch=4, hidden=384, classes=3)
VIT: dict[str, Any] = dict(size=8, patch=4, layers=2, hidden=32, classes=5)

# Model, what it is made of (a golden, or family and config), and the formats it is written in.
CASES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("CLIP", "clip/hf_quick_gelu", ("hf", "flax", "open_clip")),
    ("CLIP", "clip/open_clip_f16", ()),
    ("CLIP", "flax/clip", ()),
    (
        "CLIP with a ResNet",
        ("tinyclip", ClipConfig(ResNetConfig(size=64, width=4, blocks=(1, 2, 1, 1), heads=2), TEXT, joint=12)),
        ("open_clip",),
    ),
    (
        "TinyCLIP",
        ("tinyclip", ClipConfig(ImageConfig(32, 8, width=64, layers=2, heads=1, hidden=96), TEXT, joint=24)),
        ("original",),
    ),
    ("DiT", "dit", ("diffusers", "fair")),
    ("LiT", ("lit", DitConfig(**vars(DIT) | dict(attention="linear"))), ("fair",)),
    ("PixArt-Σ", "pixart", ("diffusers", "pixart")),
    ("text-to-image LiT", ("pixart", PixArtConfig(**PIXART | dict(attention="linear", heads=2))), ("pixart",)),
    ("T5 encoder", ("t5", T5Config(160, width=8, layers=2, heads=2, head_dim=4, hidden=12, buckets=8)), ("hf",)),
    ("autoencoder", "autoencoder", ("diffusers", "flax")),
    ("autoencoder", "flax/autoencoder", ()),
    ("ViT", "vit/timm_cls", ("timm",)),
    ("ViT", "vit/hf_vit", ("hf", "flax")),
    ("ViT", "flax/vit", ()),
    ("ViT", ("learngene", VitConfig(**VIT, width=16, heads=2, activation="gelu_tanh")), ("google",)),
    ("DeiT", "vit/timm_distilled", ("timm",)),
    ("DeiT", "vit/hf_deit_teacher", ("hf",)),
    ("DeiT", ("learngene", VitConfig(**VIT, width=192, heads=3, tokens="cls", pool="cls")), ("deit",)),
    (
        "gene of SWS",
        ("learngene", VitConfig(**GENE, width=96, heads=12, layers=5, gene="sws", layout=(3, 3, 4, 3, 3))),
        ("sws",),
    ),
    (
        "gene of TLEG",
        ("learngene", VitConfig(**GENE, width=192, heads=3, layers=2, gene="tleg", layout=(12,))),
        ("tleg",),
    ),
)


@dataclass(frozen=True)
class Row:
    """One conversion, as a row of the page."""

    model: str
    format: str
    direction: str
    reference: str
    error: float

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, self.format, self.direction, self.reference

    def __str__(self) -> str:
        return f"| {' | '.join(self.key)} | {self.error:.0e} |"

    @classmethod
    def parse(cls, line: str) -> "Row":
        *key, error = (cell.strip() for cell in line.strip("|\n ").split("|"))
        return cls(*key, error=float(error))


def rows(title: str, made_of: Any, formats: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """Convert one model to ours and to each format, and back."""

    def row(donor: Donor, to: str, direction: str, format: str) -> Row:
        check = convert(donor, folder / f"{direction} {format} {to}", to)
        assert check.reference is not None and check.max_error is not None, (title, format, check)
        reference = "our own formulas" if check.reference == OWN else check.reference
        return Row(title, format, direction, reference, check.max_error)

    native = ""
    if isinstance(made_of, str):
        donor = open_donor(GOLDENS / made_of, families())
        native = donor.format
        yield row(donor, "heirloom", "its file read", native)
        ours = open_donor(folder / f"its file read {native} heirloom", families())
    else:
        ours = open_donor(drawn(*made_of, folder / "drawn"), families())
    for format in formats:
        yield row(ours, format, "written", format)
        if format != native:
            written = open_donor(folder / f"written {format} {format}", families())
            yield row(written, "heirloom", "ours read back", format)


def drawn(family: str, cfg: Any, folder: Path) -> Path:
    """Make a weights folder of ours with numbers far from their initial values."""
    module = next(one.module for one in families() if one.name == family)
    rng, spec = np.random.default_rng(0), functional(module, cfg).spec
    scale = {path: leaf.extent("read") ** -0.5 if path.endswith("kernel") else 0.2 for path, leaf in spec.items()}
    values = {path: (scale[path] * rng.standard_normal(leaf.shape)).astype(np.float32) for path, leaf in spec.items()}
    # Variances are positive.
    values |= {path: np.abs(value) + np.float32(0.5) for path, value in values.items() if path.endswith("variance")}
    folder.mkdir()
    weights.write_params(folder, values)
    weights.write_config(folder, family, cfg)
    return folder


def page(found: list[Row]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"""# Conversions, measured

`python scripts/count_conversions.py` measured this page, on a CPU. CI runs it with `--check`. Versions:
{versions}.

Each row is one `heirloom convert` of a small model, with the comparison that it makes
([how](convert.md#verification)): outputs of our model and of the reference on the same inputs. The error is the largest
difference, relative to the largest output. {TOLERANCE:.0e} is allowed.

- *its file read*: a checkpoint that the library itself wrote.
- *written*: the reference read what heirloom wrote.
- *ours read back*: what heirloom wrote became a folder of ours again.
- *tensors renamed here*: the library read the config by itself, and got Flax's tensors under torch's names.
- *our own formulas* share our reading of the file: no library reads it with a config.

`nnx`, `orbax` and `heirloom` hold the same bits.

| model | format | direction | reference | largest error |
|---|---|---|---|---|
""" + "".join(f"{row}\n" for row in found)


def differences(found: list[Row], expected: list[Row]) -> list[str]:
    """What the page does not say of these rows, a line each."""
    known = {row.key: row.error for row in expected}
    lines = [f"not on the page: {row}" for row in found if row.key not in known]
    lines += [f"only on the page: {row}" for row in expected if row.key not in {one.key for one in found}]
    for row in found:
        allowed = max(GROWTH * known.get(row.key, row.error), NOISE)
        if not row.error <= allowed:  # true for NaN, too
            lines.append(f"larger than the page's {known[row.key]:.0e}: {row}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page, and write nothing")
    parser.add_argument("--only", default="", help="models whose name contains this; prints their rows")
    args = parser.parse_args()
    found: list[Row] = []
    for title, made_of, formats in CASES:
        if args.only in title:
            with tempfile.TemporaryDirectory() as folder:
                for row in rows(title, made_of, formats, Path(folder)):
                    print(row, flush=True)
                    found.append(row)
    if args.only:
        return
    if not args.check:
        PAGE.write_text(page(found))
        return
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    lines = differences(found, [Row.parse(line) for line in table[2:]])
    print("\n".join(lines) or f"{len(found)} conversions as {PAGE.name} says")
    sys.exit(bool(lines))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
