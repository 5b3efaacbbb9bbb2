"""TinyCLIP-ViT-61M-32-Text-29M (manual, 100 -> 75 %): from OpenCLIP ViT-B/32 laion2b_e16, which also teaches.

    heirloom train tinyclip/vit_61m_32 --run runs/vit_61m_32 --data.path "laion400m/{00000..41407}.tar"

LAION-400M as img2dataset shards, 6 epochs at batch 8192 (script/*.sh of the release; about 48,800 steps an epoch).
Hardware of the release: 32 GPUs. Expected: 62.4 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from common.data.pipeline import PipelineConfig
from common.data.sources import SourceConfig
from common.train.mesh import MeshConfig
from common.train.optim import OptimConfig
from common.train.step import StepConfig
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32, STUDENTS


def get_config() -> Config:
    return Config(
        student=STUDENTS["vit_61m_32"],
        teacher=LAION_B_32,
        donor=LAION_B_32,
        data=SourceConfig("laion400m/*.tar"),
        pipeline=PipelineConfig(batch=8192, workers=16),
        optim=OptimConfig(lr=1e-4, warmup=2000),
        step=StepConfig(compute="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=8),
        steps=292_968,
        published={"top1": 62.4},
    )
