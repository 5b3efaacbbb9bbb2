"""The config of a generator."""

from dataclasses import dataclass, field
from typing import Literal, cast

from heirloom.common.diffusion import Schedule, linear_schedule, scaled_linear_schedule
from heirloom.common.errors import InputError, between, positive
from weightgen.codec import TokenVaeConfig
from weightgen.generator.conditions import SetConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.tokens import TokenSpec, one_chunk
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.zoo import head_tokens

FULL = 1000  # steps of the default schedule


ConditionKind = Literal["per_class", "set", "mlp", "text", "label", "chunk"]


@dataclass(frozen=True)
class GeneratorConfig:
    """A generator of the weights of one architecture; its condition is pictures of classes, words, or a number."""

    net: NetConfig | None = field(default_factory=NetConfig)
    """None: imported checkpoints, cut as `cut` says."""
    latent: int = 48
    """Numbers a token is coded in by PCA."""
    condition: ConditionKind = "per_class"
    """per_class: a token for each class, equivariant to their order; set: the released Set Transformers, which do not
    know the order; mlp: the released dense layers over slots, which do; text: an embedding of words; label: one of the
    tasks of the zoo; chunk: the number of the chunk, each drawn by itself.
    """
    shots: int = 5
    """Pictures of each class in a condition, at most."""
    prior: Literal["none", "linear"] = "linear"
    """linear: a ridge map from the condition to the weights, fitted before; diffusion then models the residual."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    told: int = 0
    """Condition feature size: of a picture or a text; 0: as many as the network has inputs."""
    schedule: Literal["linear", "scaled_linear"] = "linear"
    """linear: 1000 steps of DDPM; scaled_linear: 1024 steps as released."""
    cut: TokenSpec | None = None
    """How imported checkpoints are cut into tokens; None: a network of ours, `net`."""
    codec: TokenVaeConfig | None = None
    """None: PCA."""
    encoder: SetConfig | None = None
    """Sizes of the Set Transformers of the condition `set`; None: the released ones."""
    labels: int = 0
    """Number of tasks or chunks, of the conditions label and chunk."""

    def __post_init__(self) -> None:
        positive(self, "latent", "shots")
        between(self, "told", "labels", below=2**30)
        if self.prior == "linear" and self.condition in ("label", "chunk"):
            raise InputError(f'prior "linear" does not work with condition "{self.condition}": set prior to "none"')
        if self.prior == "linear" and self.codec is not None:
            raise InputError('prior "linear" needs the PCA codec: set prior to "none", or use no learned codec')
        if (self.net is None) == (self.cut is None):
            raise InputError("set exactly one of net (a network) and cut (imported checkpoints)")
        if self.condition in ("label", "chunk") and self.labels < 1:
            number = "needs the number of tasks or chunks"
            raise InputError(f"labels is {self.labels}: the condition {self.condition} {number}")

    @property
    def tokens(self) -> TokenSpec:
        """Tokens of one draw: a network, or a single chunk of one."""
        return one_chunk(self.whole) if self.condition == "chunk" else self.whole

    @property
    def whole(self) -> TokenSpec:
        """Tokens of a whole network."""
        return self.cut or head_tokens(cast(NetConfig, self.net))

    @property
    def latent_size(self) -> int:
        """Numbers a token is coded in, by the codec in use."""
        return self.latent if self.codec is None else self.codec.latent

    @property
    def features(self) -> int:
        """Condition feature size."""
        return self.told or (self.net.features if self.net else 0)

    @property
    def ways(self) -> int:
        """Classes in a condition."""
        return self.net.classes if self.net else 1

    @property
    def fitted(self) -> tuple[str, ...]:
        """Path patterns of parameters that are fitted before training and never updated."""
        return ("codec/**", "prior/**") if self.prior == "linear" else ("codec/**",)

    @property
    def by_row(self) -> bool:
        """Whether tokens are exchangeable rows of a head, each with its class's condition; others have places."""
        placed = self.codec is not None and self.codec.order == "ordered"
        return self.net is not None and self.net.kind == "head" and self.condition == "per_class" and not placed

    def chain(self) -> Schedule:
        return linear_schedule(FULL) if self.schedule == "linear" else scaled_linear_schedule()
