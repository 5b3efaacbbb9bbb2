"""The embedded teacher: a CLIP of 5.5 M parameters (and 4,096 tokens) that mimics two locked pretrained towers.

    python scripts/build_icon_pairs.py --cache data/cache --out data/icons.parquet
    python scripts/locked_towers.py --cache data/cache --icons data/icons.parquet --out data/teacher_pairs.parquet
    heirloom train tinyclip/emoji_teacher --run runs/emoji_teacher

The targets are joint embeddings of a frozen EfficientNet-Lite0 and a frozen MiniLM, through two small heads trained on
the same pairs. No held-out emoji is among them. Two CPU cores, about an hour; measured:
tinyclip_jax/emoji_teacher/README.md.
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import EMBEDDINGS, TARGETS, Config, LossConfig


def get_config() -> Config:
    return Config(
        student=ClipConfig(
            image=ImageConfig(size=60, patch=12, width=192, layers=8, heads=3, hidden=768),
            text=TextConfig(context=16, vocab=4096, width=192, layers=4, heads=3, hidden=768),
            joint=256,
        ),
        teacher=EMBEDDINGS,
        tokenizer="fit",
        data=SourceConfig(path="data/teacher_pairs.parquet", columns=(*TARGETS, "tags")),
        held_out=SourceConfig(path="emoji", split="test"),
        pipeline=PipelineConfig(batch=256, tags=0.2),
        loss=LossConfig(teacher_scale=30.0),  # the scale the heads learned
        optim=OptimConfig(lr=1.5e-3, warmup=60, weight_decay=0.1),
        steps=1000,
        log_every=10,
        eval_every=100,
        save_every=100,
    )
