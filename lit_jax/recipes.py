"""Settings that the published recipes share."""

from dataclasses import replace

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.step import StepConfig
from lit_jax.dit import DitConfig
from lit_jax.inherit import Keep
from lit_jax.pixart import PixArtConfig
from lit_jax.text_recipe import Config as TextConfig
from lit_jax.train import DIT_OPTIMIZER, Config
from lit_jax.zoo import AUTOENCODER


def imagenet(student: DitConfig, *, steps: int, batch: int = 256, donor: str = "", teacher: str = "") -> Config:
    """Make a config: AdamW at a constant 1e-4, no decay, EMA 0.9999, on the latent cache `data/imagenet_PIXELS`
    (heirloom cache).

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


def text_to_image(
    student: PixArtConfig, *, donor: str, teacher: str, steps: int, batch: int, keep: Keep = "o"
) -> TextConfig:
    """Make a config of the released text-to-image LiT: CAME at 2e-5 after 1000 steps of warm-up, clip 0.01, no EMA,
    forty ratios, activations recomputed, lambda 1 and 0.05.

    Deviation: activations and kernels are bf16, where the released code has fp16 autocast; queries and keys of the
    linear attention are summed in f32 as there.
    """
    return TextConfig(
        student=replace(student, remat="full"),
        donor=donor,
        teacher=teacher,
        keep=keep,
        data=SourceConfig(path=f"data/t2i_{8 * student.size}/train"),
        pipeline=PipelineConfig(batch=batch, workers=8),
        steps=steps,
        log_every=100,
        eval_every=5_000,
        save_every=5_000,
    )
