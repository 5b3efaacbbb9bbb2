"""TinyCLIP-ViT-8M-16-Text-3M (manual): from the trained 39M/16, on YFCC-15M.

    heirloom train tinyclip/vit_8m_16 --run runs/vit_8m_16 --data.path "yfcc15m/*.tar"

25 epochs at batch 4096 (samples seen as other papers give them); the lineage 12 -> 10 image and 6 -> 3 text layers is inferred
(spec §3.3). Expected: 41.1 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from common.data.pipeline import PipelineConfig
from common.data.sources import SourceConfig
from common.train.mesh import MeshConfig
from common.train.optim import OptimConfig
from common.train.step import StepConfig
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import OPENAI_B_16, STUDENTS, TINYCLIP_39M


def get_config() -> Config:
    return Config(
        student=STUDENTS["vit_8m_16"],
        teacher=OPENAI_B_16,
        donor=TINYCLIP_39M,
        data=SourceConfig("yfcc15m/*.tar"),
        pipeline=PipelineConfig(batch=4096, workers=16),
        optim=OptimConfig(lr=1e-4, warmup=2000),
        step=StepConfig(compute="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=8),
        steps=91_552,
        published={"top1": 41.1},
    )
