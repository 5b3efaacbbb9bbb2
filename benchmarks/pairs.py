"""The pairs of calls of side_by_side.py: ours, and what people would use instead, on the same inputs in float32."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch.nn import functional as F

from benchmarks.draw_pipeline import write_random
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.mesh import batch_sharding, start
from heirloom.common.nn.attention import softmax
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.train.parameters import load_params
from heirloom.common.train.state import create_state
from heirloom.common.train.step import LossFn, StepConfig, make_step
from heirloom.common.vit.model import Vit, VitConfig
from learngene.losses import cross_entropy
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.dit import Dit, DitConfig
from lit_jax.kernels.xla import depthwise
from lit_jax.zoo import FAMILY as LIT
from lit_jax.zoo import dit, lit
from tinyclip_jax.losses import contrastive
from tinyclip_jax.model import Clip, ClipConfig
from tinyclip_jax.zoo import FAMILY as CLIP
from tinyclip_jax.zoo import STUDENTS, VIT_B_32

RATE, DECAY = 1e-4, 0.05  # of AdamW, in both libraries
HEAD = 72  # channels of a head, as in DiT-XL

torch.set_num_threads(len(os.sched_getaffinity(0)))


class Pair(NamedTuple):
    """Two calls. alike: turns the result of `theirs` into arrays laid out as ours; None where weights differ."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    alike: Callable[[Any], Sequence[Any]] | None = None

    def difference(self) -> float | None:
        """Largest difference of the results, relative to the largest value; None where they cannot be compared."""
        if self.alike is None:
            return None
        pairs = zip(jax.tree.leaves(self.ours()), map(np.asarray, self.alike(self.theirs())), strict=True)
        return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def nhwc(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.permute(0, 2, 3, 1)]


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def our_step(model: Functional, loss: LossFn, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """A train step as `heirloom train` takes it, AdamW."""
    mesh, optimizer = start(), optax.adamw(RATE, weight_decay=DECAY)
    step = make_step(loss, optimizer, model.spec, mesh, StepConfig())
    state = create_state(model.init(jax.random.key(0)), optimizer, model.spec, mesh)
    placed = jax.device_put(batch, batch_sharding(mesh))

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, placed)
        return metrics

    return call


def their_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.train().parameters(), RATE, weight_decay=DECAY)

    def call() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return call


def clip_of_transformers(cfg: ClipConfig) -> Any:
    """transformers' CLIP of these sizes, random weights."""
    from transformers import CLIPConfig, CLIPModel

    def tower(c: Any, **more: Any) -> dict[str, Any]:
        sizes = dict(hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers)
        return sizes | dict(num_attention_heads=c.heads, hidden_act="gelu", projection_dim=cfg.joint) | more

    image: Any = cfg.image
    vision = tower(image, image_size=image.size, patch_size=image.patch)
    # With an eos_token_id of 2, transformers pools at the largest token, as CLIP does.
    text = tower(cfg.text, vocab_size=cfg.text.vocab, max_position_embeddings=cfg.text.context, eos_token_id=2)
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=cfg.joint)).eval()


def shrunk(cfg: ClipConfig) -> ClipConfig:
    small: dict[str, Any] = dict(width=64, layers=1, heads=1, hidden=128)
    return replace(cfg, image=replace(cfg.image, **small), text=replace(cfg.text, **small))


def clip_inputs(cfg: ClipConfig, images: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
    size, vocab = cfg.image.size, cfg.text.vocab
    tokens = np.random.default_rng(1).integers(0, vocab - 1, (texts, cfg.text.context), dtype=np.int32)
    tokens[:, -1] = vocab - 1
    return drawn(images, size, size, 3), tokens


def train_clip(smoke: bool) -> Pair:
    cfg = replace(STUDENTS["vit_8m_16"], image=replace(STUDENTS["vit_8m_16"].image, size=112))
    cfg, pairs = (shrunk(cfg), 4) if smoke else (cfg, 64)
    images, tokens = clip_inputs(cfg, pairs, pairs)
    model = functional(Clip, cfg)

    def loss(params: Any, batch: Any, key: Any, frozen: Any) -> Any:
        image, text, scale, _ = model.apply(params, batch["image"], batch["text"])
        return contrastive(image, text, scale), {}

    theirs, pixels, ids = clip_of_transformers(cfg), nchw(images), torch.from_numpy(tokens).long()
    their_loss = lambda: theirs(pixel_values=pixels, input_ids=ids, return_loss=True).loss  # noqa: E731
    return Pair(our_step(model, loss, {"image": images, "text": tokens}), their_step(theirs, their_loss))


def train_deit(smoke: bool) -> Pair:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = dict(width=192, heads=3, hidden=768, layers=1 if smoke else 12)
    cfg = VitConfig(size=32 if smoke else 224, tokens="cls", pool="cls", eps=1e-12, **sizes)
    images, labels = drawn(16, cfg.size, cfg.size, 3), np.arange(16)
    model = functional(Vit, cfg)

    def loss(params: Any, batch: Any, key: Any, frozen: Any) -> Any:
        return cross_entropy(model.apply(params, batch["image"]), jax.nn.one_hot(batch["label"], cfg.classes)), {}

    named: dict[str, Any] = dict(
        hidden_size=cfg.width, num_attention_heads=cfg.heads, intermediate_size=cfg.hidden, image_size=cfg.size,
        num_hidden_layers=cfg.layers, num_labels=cfg.classes,
    )  # fmt: skip
    theirs, pixels, targets = ViTForImageClassification(ViTConfig(**named)), nchw(images), torch.from_numpy(labels)
    their_loss = lambda: F.cross_entropy(theirs(pixel_values=pixels).logits, targets)  # noqa: E731
    return Pair(our_step(model, loss, {"image": images, "label": labels}), their_step(theirs, their_loss))


def opened(folder: Path, family: Any) -> tuple[Functional, Any]:
    donor = open_donor(folder, [family])
    return donor.model, load_params(donor, start())


def encode(what: str, smoke: bool) -> Pair:
    """Images [16, 224, 224, 3] or texts [64, 77] to unit vectors, by the same weights."""
    cfg = shrunk(VIT_B_32) if smoke else VIT_B_32
    images, tokens = clip_inputs(cfg, 16, 64)
    theirs, pixels, ids = clip_of_transformers(cfg), nchw(images), torch.from_numpy(tokens).long()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = opened(Path(folder), CLIP)
    run = jax.jit(partial(model.apply, method=f"encode_{what}"))

    def call() -> torch.Tensor:
        if what == "image":
            return F.normalize(theirs.visual_projection(theirs.vision_model(pixel_values=pixels).pooler_output))
        return F.normalize(theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output))

    given = jnp.asarray(images if what == "image" else tokens)
    return Pair(lambda: run(params, given), without_gradients(call), lambda x: [x])


def denoise(cfg: DitConfig, their_cfg: DitConfig, smoke: bool) -> Pair:
    """Two latents, as guidance needs. The weights are the same where the configs are."""
    from diffusers import DiTTransformer2DModel

    if smoke:
        toy: dict[str, Any] = dict(size=8, width=64, layers=1, hidden=256)
        cfg, their_cfg = replace(cfg, heads=2, **toy), replace(their_cfg, heads=2, **toy)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "dit")
        write_random(LIT, their_cfg, there, 0)
        theirs = DiTTransformer2DModel.from_pretrained(there).eval()
        if cfg == their_cfg:
            model, params = opened(there, LIT)
        else:
            model = functional(Dit, cfg)
            params = model.init(jax.random.key(0))
    # At time 0 the features of the time are the same: diffusers has other frequencies than DiT's release.
    x, t, labels = drawn(2, cfg.size, cfg.size, 4), np.zeros(2, int), np.arange(2)
    given = [jnp.asarray(a) for a in (x, t.astype(np.float32), labels)]
    run, turned, times, classes = jax.jit(model.apply), nchw(x), torch.from_numpy(t), torch.from_numpy(labels)
    call = without_gradients(lambda: theirs(turned, timestep=times, class_labels=classes).sample)
    return Pair(lambda: run(params, *given), call, nhwc if cfg == their_cfg else None)


def decode(smoke: bool) -> Pair:
    """A latent of 32 x 32 to a picture of 256 pixels by Stable Diffusion's autoencoder."""
    from diffusers import AutoencoderKL

    cfg = AutoencoderConfig(channels=(32, 32), resnets=1) if smoke else AutoencoderConfig()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "vae")
        write_random(AUTOENCODERS, cfg, there, 0)
        theirs, (model, params) = AutoencoderKL.from_pretrained(there).eval(), opened(there, AUTOENCODERS)
    z = drawn(1, 32, 32, 4)
    run, given, turned = jax.jit(partial(model.apply, method="decode")), jnp.asarray(z), nchw(z)
    return Pair(lambda: run(params, given), without_gradients(lambda: theirs.decode(turned).sample), nhwc)


def calls(ours: Any, theirs: Any, arrays: list[np.ndarray], above: np.ndarray, gradient: bool, alike: Any) -> Pair:
    """`ours(*arrays)` and `theirs(*tensors)`, or these with their gradients along `above`."""
    given, up = [jnp.asarray(x) for x in arrays], jnp.asarray(above)
    tensors, their_up = [torch.from_numpy(x).requires_grad_(gradient) for x in arrays], torch.from_numpy(above)

    def both(up: jax.Array, *given: jax.Array) -> Any:
        out, back = jax.vjp(ours, *given)
        return out, back(up)

    def their_both() -> Any:
        out = theirs(*tensors)
        return out.detach(), *torch.autograd.grad(out, tensors, their_up)

    if gradient:
        run = jax.jit(both)
        return Pair(lambda: run(up, *given), their_both, alike)
    run = jax.jit(ours)
    return Pair(lambda: run(*given), without_gradients(lambda: (theirs(*tensors),)), alike)


def attend(tokens: int, gradient: bool, smoke: bool) -> Pair:
    """16 heads of 72 channels, [1, token, head, channel]."""
    shape = (1, 64 if smoke else tokens, 2 if smoke else 16, HEAD)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    arrays = [drawn(*shape, seed=seed) for seed in range(3)]
    return calls(softmax(), theirs, arrays, drawn(*shape, seed=3), gradient, lambda found: found)


def branch(side: int, channels: int, gradient: bool, smoke: bool) -> Pair:
    """The depthwise convolution of LiT's values, 5 x 5, one image."""
    side, channels = (8, 32) if smoke else (side, channels)
    shape = (1, side * side, 1, channels)

    def ours(v: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return depthwise(v, weight, bias, (side, side))

    def theirs(v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        images = v.reshape(1, side, side, channels).permute(0, 3, 1, 2)
        out = F.conv2d(images, weight.permute(2, 0, 1)[:, None], bias, padding=2, groups=channels)
        return out.permute(0, 2, 3, 1).reshape(shape)

    arrays = [drawn(*shape), drawn(5, 5, channels, seed=1), drawn(channels, seed=2)]
    return calls(ours, theirs, arrays, drawn(*shape, seed=3), gradient, lambda found: found)


PAIRS: dict[str, Callable[[bool], Pair]] = {
    "train step, CLIP-8M/16, 64 pairs of 112 px": train_clip,
    "train step, DeiT-Ti, 16 pictures of 224 px": train_deit,
    "encode 16 images, CLIP B/32": partial(encode, "image"),
    "encode 64 texts, CLIP B/32": partial(encode, "text"),
    "DiT-B/2, 256 tokens": partial(denoise, dit("b"), dit("b")),
    "VAE decoder, 256 px": decode,
    "LiT-B/2; DiT-B/2, 1,024 tokens": partial(denoise, lit("b", pixels=512), dit("b", pixels=512)),
    "LiT-B/2; DiT-B/2, 4,096 tokens": partial(denoise, lit("b", pixels=1024), dit("b", pixels=1024)),
}
for _tokens in (256, 1024, 4096):
    for _gradient in (False, True):
        _what = "forward and gradient" if _gradient else "forward"
        PAIRS[f"softmax attention, {_tokens:,} tokens, {_what}"] = partial(attend, _tokens, _gradient)
for _side, _channels in ((16, 768), (64, 1152)):
    for _gradient in (False, True):
        _what = "forward and gradient" if _gradient else "forward"
        PAIRS[f"depthwise branch, {_side} x {_side} x {_channels}, {_what}"] = partial(
            branch, _side, _channels, _gradient
        )
