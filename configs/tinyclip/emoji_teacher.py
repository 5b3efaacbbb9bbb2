"""The embedded teacher: a CLIP of 5.5 M parameters (and a table of 4,096 tokens) that mimics two locked pretrained towers.

    python scripts/build_icon_pairs.py --cache cache --out data/icons.parquet
    python scripts/locked_towers.py ...                            # writes data/teacher_pairs.parquet
    heirloom train tinyclip/emoji_teacher --run runs/emoji_teacher

The targets are the joint embeddings of a frozen EfficientNet-Lite0 and a frozen MiniLM; no held-out concept is among the pairs.
Two CPU cores, about an hour. The measured retrieval is in tinyclip_jax/emoji_teacher/README.md.
"""

from common.data.pipeline import PipelineConfig
from common.data.sources import SourceConfig
from common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import EMBEDDINGS, TARGETS, Config


def get_config() -> Config:
    return Config(
        student=ClipConfig(
            ImageConfig(size=60, patch=12, width=192, layers=8, heads=3, hidden=768),
            TextConfig(context=16, vocab=4096, width=192, layers=4, heads=3, hidden=768),
            joint=256,
        ),
        teacher=EMBEDDINGS,
        tokenizer="fit",
        data=SourceConfig("data/teacher_pairs.parquet", columns=TARGETS),
        held_out=SourceConfig("emoji", split="test"),
        pipeline=PipelineConfig(batch=256),
        optim=OptimConfig(lr=1e-3, warmup=200, weight_decay=0.1),
        steps=2000,
        log_every=20,
        eval_every=200,
        save_every=200,
    )
