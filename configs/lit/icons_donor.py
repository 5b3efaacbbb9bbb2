"""The donor of a small text-to-image pair: a PixArt with softmax attention that draws icons of 64 pixels.

    heirloom train lit/icons_donor --run runs/icons_donor
    heirloom sample runs/icons_donor --prompt "a red apple"

The data, the autoencoder and the text encoder are embedded. Some 180 icons a second on two CPU cores: an hour.
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.step import StepConfig
from lit_jax.denoiser import PromptConfig
from lit_jax.text_recipe import Config
from lit_jax.zoo import icons_pixart


def get_config() -> Config:
    return Config(
        student=icons_pixart(),
        data=SourceConfig(path="icons", split="train"),
        held_out=SourceConfig(path="icons", split="test"),
        ratios="square",
        noisy_weight=10.0,
        pipeline=PipelineConfig(batch=16),
        autoencoder="embedded:icons_autoencoder",
        text_encoder="embedded:emoji",
        prompts=(
            *("a red apple", "a blue car", "a green heart", "a yellow star", "a purple cat", "an orange house"),
            *("a pink butterfly", "a brown horse", "a black umbrella", "a grey key", "a red fish", "a green tree"),
        ),
        sample=PromptConfig(guidance=3.0),
        optim=OptimConfig(lr=1e-3, warmup=1000, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0),
        step=StepConfig(ema=0.999),
        steps=24_000,
        log_every=100,
        eval_every=2000,
        save_every=2000,
    )
