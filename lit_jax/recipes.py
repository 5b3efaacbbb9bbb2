"""Settings that the published ImageNet recipes share."""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.step import StepConfig
from lit_jax.dit import DitConfig
from lit_jax.train import DIT_OPTIMIZER, Config
from lit_jax.zoo import AUTOENCODER


def imagenet(student: DitConfig, *, steps: int, batch: int = 256, donor: str = "", teacher: str = "") -> Config:
    """Make a config: AdamW at a constant 1e-4, no decay, EMA 0.9999, on the latent cache `data/imagenet_PIXELS`
    (scripts/cache_latents.py).

    Deviation: activations and kernels are bf16; the papers use f32 with TF32 matmuls. Deviation: a teacher sees the
    same dropped labels as the student; the released code drops only the student's (--distill.dropped student).
    """
    return Config(
        student=student,
        donor=donor,
        teacher=teacher,
        data=SourceConfig(path=f"data/imagenet_{8 * student.size}", image="", text="", columns=("moments",)),
        pipeline=PipelineConfig(batch=batch, workers=8),
        autoencoder=AUTOENCODER,
        optim=DIT_OPTIMIZER,
        step=StepConfig(compute="bfloat16", ema=0.9999),
        steps=steps,
    )
