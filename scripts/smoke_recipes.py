"""A few steps of every TinyCLIP recipe at its real size, on a CPU: does it build, inherit, train, cut and save?

    python scripts/smoke_recipes.py --out docs/recipes.md    # all
    python scripts/smoke_recipes.py tinyclip/vit_61m_32      # one

Architecture, loss, optimizer, precision and stages are the recipe's. Not: its data (embedded emoji, four a step), its
number of steps and warm-up, its mesh, and its teacher and donor, which are drawn at random in the sizes of the
published ones.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
from pyarrow import parquet

from heirloom.common import config
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.mesh import MeshConfig
from heirloom.common.nn.functional import functional
from tinyclip_jax.cost import parameters
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.train import EMBEDDINGS, TARGETS, Config
from tinyclip_jax.zoo import PUBLISHED, STUDENTS, open_clip_model

BATCH, STEPS, MASKED = 4, 3, 2
DRAWN: dict[str, ClipConfig] = PUBLISHED | {"runs/rn_30m/model": STUDENTS["rn_30m"]}
PAIRS = SourceConfig("emoji:noto", split="test")


HEAD = f"""# Every TinyCLIP recipe, a few steps

Each TinyCLIP recipe ran here for {STEPS} steps a stage at its real size. This shows that a recipe builds, inherits, trains, cuts and
saves, **not that it learns**: data are embedded emoji, {BATCH} a step, and teacher and donor are drawn at random in the published sizes.
Architecture, loss, optimizer, precision and stages are the recipe's. Sizes in names count the image tower alone; the parameters here count
the text tower and its token table, too. Seconds are of a shared CPU core. The size of an automatic model is
arbitrary here: its masks were learned for {MASKED} steps at a large rate.

    python scripts/smoke_recipes.py --out docs/recipes.md

| recipe | stages | parameters at the end | loss | seconds |
|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="*", default=[name for name in config.recipes() if name.startswith("tinyclip/")]
    )
    parser.add_argument("--out", type=Path, help="where the table goes as well")
    args = parser.parse_args()
    rows = []
    for name in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            row = smoke(config.load(name), Path(folder))
        loss = " -> ".join(f"{value:.3f}" for value in row["loss"])
        rows.append(f"| {name} | {row['stages']} | {row['parameters']:,} | {loss} | {row['seconds']:.0f} |")
        print(rows[-1], flush=True)
        if args.out:
            args.out.write_text(HEAD + "\n".join(rows) + "\n")


def smoke(recipe: Any, folder: Path) -> dict[str, Any]:
    """Train `short(recipe)` in `folder`; what came of it. Raises FloatingPointError for a loss that is no number."""
    assert isinstance(recipe, Config)
    started, cfg, run = time.perf_counter(), short(recipe, folder), folder / "run"
    cfg.train(run)
    stages = [run / f"stage_{n + 1}" for n in range(len(cfg.stages))] or [run]
    loss = [json.loads(line)["loss"] for stage in stages for line in (stage / "metrics.jsonl").read_text().splitlines()]
    if not all(map(math.isfinite, loss)):
        raise FloatingPointError(f"losses {loss}")
    total = parameters(open_clip_model(str(stages[-1] / "model")).source.spec)["total"]
    return {
        "stages": len(stages),
        "parameters": total,
        "loss": (loss[0], loss[-1]),
        "seconds": time.perf_counter() - started,
    }


def short(cfg: Config, folder: Path) -> Config:
    """A few steps of a recipe on a few emoji, with what cannot be had here drawn into `folder`.

    A cut comes as early as it can, and takes something away: the masks' rate is large.
    """

    def here(source: str) -> str:
        return drawn(DRAWN[source], folder / source.replace("/", "-")) if source in DRAWN else source

    def mask(masks: MaskConfig) -> MaskConfig:
        return replace(masks, prune_step=MASKED, warmup=1, lr=8.0) if masks.prune_step else masks

    stages = tuple(replace(stage, steps=STEPS, warmup=1, masks=mask(stage.masks)) for stage in cfg.stages)
    data = embeddings(cfg.student.joint, folder) if cfg.teacher == EMBEDDINGS else PAIRS
    return replace(
        cfg,
        teacher=here(cfg.teacher),
        donor=here(cfg.donor),
        data=replace(data, columns=cfg.data.columns),
        held_out=SourceConfig(),
        pipeline=replace(cfg.pipeline, batch=BATCH, workers=0),
        mesh=MeshConfig(),
        optim=replace(cfg.optim, warmup=1),
        steps=STEPS,
        masks=mask(cfg.masks),
        stages=stages,
        log_every=1,
        save_every=STEPS,
    )


def drawn(cfg: ClipConfig, folder: Path) -> str:
    """A CLIP that has learned nothing, as a weights folder."""
    if not folder.exists():
        model = functional(Clip, cfg)
        Pretrained(cfg, model, model.init(jax.random.key(0)), Preprocess(cfg.image.size), Tokenizer.clip()).save(folder)
    return str(folder)


def embeddings(joint: int, folder: Path) -> SourceConfig:
    """Emoji with columns as a teacher's embeddings, drawn."""
    source, rng = open_source(replace(PAIRS, columns=("tags",))), np.random.default_rng(0)
    rows = [
        {"image": r["image"], "caption": r["text"], "tags": r["tags"]} for r in (source[i] for i in range(len(source)))
    ]
    unit = rng.standard_normal((len(rows), 2, joint)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    for row, pair in zip(rows, unit, strict=True):
        row |= dict(zip(TARGETS, pair.tolist(), strict=True))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet")
    return SourceConfig(str(folder / "pairs.parquet"))


if __name__ == "__main__":
    main()
