"""Learned masks: reference values of the released code, and that cutting what they close changes no output."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax import masks
from tinyclip_jax.automatic import mask_optimizer
from tinyclip_jax.cost import parameters
from tinyclip_jax.inherit import expand, prune
from tinyclip_jax.masks import (
    MaskConfig,
    Masked,
    constraint,
    deterministic_gate,
    open_probability,
    prunable,
    sample_gate,
    sparsity,
)
from tinyclip_jax.model import Clip
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import VIT_B_32


@pytest.mark.parametrize(
    ("log_alpha", "expected"),
    [
        (10.0, 0.999991),
        (4.60517, 0.997982),
        (2.0, 0.973367),
        (1.0, 0.930771),
        (0.0, 0.831822),
        (-1.0, 0.645335),
        (-2.0, 0.400975),
        (-4.60517, 0.047130),
    ],
)
def test_open_probability_is_the_probability_that_a_gate_is_open(log_alpha, expected):
    assert float(open_probability(log_alpha)) == pytest.approx(expected, abs=1e-6)
    draws = sample_gate(log_alpha, jnp.linspace(masks.EPS, 1 - masks.EPS, 100_001))
    assert float((draws > 0).mean()) == pytest.approx(expected, abs=2e-5)


def test_gates_of_training():
    assert float(sample_gate(1.0, 0.3)) == pytest.approx(0.568417, abs=1e-6)
    assert float(sample_gate(2.0, 0.01)) == 0
    assert float(sample_gate(-2.0, 0.99)) == 1


def test_gates_of_evaluation_keep_soft_values_and_drop_the_smallest():
    np.testing.assert_allclose(deterministic_gate(np.array([4.60517], np.float32)), [0.996035], atol=1e-6)
    found = deterministic_gate(np.array([3.0, 2, 1, 0, -1, -2, -3, 4], np.float32))
    np.testing.assert_allclose(found[[2, 3]], [0.768525, 0.5], atol=1e-6)
    assert np.flatnonzero(found == 0).tolist() == [5, 6]
    assert (
        np.flatnonzero(
            deterministic_gate(np.array([3.0, 2, 1, 0, -1, -2, -3, 4], np.float32), round_to=4) == 0
        ).tolist()
        == []
    )
    assert np.count_nonzero(deterministic_gate(np.full((2, 100), -4.60517))) == 2 * 5  # 4.7 of 100 expected, per row


def test_zeros_are_rounded_half_to_even(monkeypatch):
    monkeypatch.setattr(masks, "open_probability", lambda x: np.full(np.shape(x), 0.25))
    assert np.count_nonzero(deterministic_gate(np.arange(6.0))) == 6 - 4  # 4.5 zeros expected
    assert np.count_nonzero(deterministic_gate(np.arange(2.0))) == 2 - 2  # 1.5 zeros expected


def test_sizes_of_vit_b_32():
    assert (prunable(VIT_B_32, "image"), prunable(VIT_B_32, "text")) == (85_017_600, 37_804_032)
    leaves = masks.initial_masks(VIT_B_32, VIT_B_32)
    assert float(sparsity(VIT_B_32, leaves)) == pytest.approx(0.000644, abs=1e-6)
    assert float(sparsity(VIT_B_32, masks.clip_log_alphas(leaves))) == pytest.approx(0.004654, abs=1e-6)


def test_the_constraint_is_one_sided_and_raised_by_its_multipliers():
    leaves = {f"masks/{t}/{name}": jnp.float32(10) for t in masks.TOWERS for name in masks.MULTIPLIERS}
    assert float(constraint(0.20, 0.25, leaves)) == pytest.approx(0.525, abs=1e-6)
    assert float(constraint(0.30, 0.25, leaves)) == 0
    assert float(MaskConfig(start=0.25, target=0.5).target_at(500)) == pytest.approx(0.375)
    assert float(MaskConfig(start=0.25, target=0.5).target_at(4000)) == 0.5


@pytest.fixture(scope="module")
def small(cfg):
    """The CLIP of these tests with GELUs, and log-alphas drawn so that something of everything closes."""
    cfg = replace(cfg, image=replace(cfg.image, activation="gelu"), text=replace(cfg.text, activation="gelu"))
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(0.5, 2.5, leaf.shape).astype(np.float32) for path, leaf in masks.mask_spec(cfg).items()}
    leaves = {path: np.array(value) for path, value in masks.clip_log_alphas(leaves).items()}
    leaves["masks/image/head"][1] = -9  # a layer that loses all heads
    leaves["masks/text/hidden"][0] = -9  # one that loses all hidden units
    return cfg, leaves


@pytest.fixture(scope="module")
def pruned(small, params):
    cfg, leaves = small
    return prune(cfg, params, masks.deterministic_gates(leaves))


def outputs(model, params, images, tokens):
    features = jax.jit(model.apply)(params, images, tokens)
    return np.concatenate([features.image, features.text], axis=1)


def test_masked_and_pruned_compute_the_same(small, pruned, params, images, tokens):
    cfg, leaves = small
    gates = masks.deterministic_gates(leaves)
    masked = outputs(Masked(functional(Clip, cfg), cfg), params | gates, images, tokens)
    assert (
        pruned.cfg.image.heads[1] == 0 and pruned.cfg.text.hidden[0] == 0 and pruned.cfg.image.width < cfg.image.width
    )
    np.testing.assert_allclose(outputs(functional(Clip, pruned.cfg), pruned.params, images, tokens), masked, atol=1e-5)
    assert np.abs(masked - outputs(functional(Clip, cfg), params, images, tokens)).max() > 0.1


def test_where_gates_act_is_as_written_out(small, params, images, tokens):
    """The forward pass of the release in plain sums, with gates only where it has them.

    Gates come behind positions, heads, hidden units and both outputs of a block, never on what a norm or a projection
    gives.
    """
    cfg, leaves = small
    gates = masks.deterministic_gates(leaves)

    def norm(x, path, open_, i=...):
        x = x[..., open_]
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        out = np.zeros((*x.shape[:-1], len(open_)))
        out[..., open_] = y * params[f"{path}/scale"][i][open_] + params[f"{path}/bias"][i][open_]
        return out

    def tower(name, x, causal):
        width, blocks = gates[f"masks/{name}/embed"], f"{name}/blocks"
        open_ = width != 0
        x = x * width
        x = norm(x, "image/pre_norm", open_) if name == "image" else x
        for i in range(len(gates[f"masks/{name}/head"])):
            leaf = {
                path.removeprefix(f"{blocks}/"): value[i] for path, value in params.items() if path.startswith(blocks)
            }
            y = norm(x, f"{blocks}/attn_norm", open_, i)
            q, k, v = (
                np.einsum("bte,ehd->bthd", y, leaf[f"attn/{n}/kernel"]) + leaf[f"attn/{n}/bias"]
                for n in ("query", "key", "value")
            )
            scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf) if causal else scores
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            heads = np.einsum("bhts,bshd->bthd", weights, v) * gates[f"masks/{name}/head"][i][:, None]
            x = x + (np.einsum("bthd,hde->bte", heads, leaf["attn/out/kernel"]) + leaf["attn/out/bias"]) * width
            y = norm(x, f"{blocks}/mlp_norm", open_, i)
            units = (
                jax.nn.gelu(y @ leaf["mlp/up/kernel"] + leaf["mlp/up/bias"], approximate=False)
                * gates[f"masks/{name}/hidden"][i]
            )
            x = x + (units @ leaf["mlp/down/kernel"] + leaf["mlp/down/bias"]) * width
        return norm(x, f"{name}/post_norm", open_)

    size, patch = cfg.image.size, cfg.image.patch
    n = size // patch
    cut = np.asarray(images).reshape(len(images), n, patch, n, patch, 3)
    patches = np.einsum("biyjxc,yxce->bije", cut, params["image/patch/project/kernel"]).reshape(len(images), n * n, -1)
    position = params["image/position"].reshape(n * n, -1)
    first = np.broadcast_to(params["image/cls"] + params["image/cls_position"], (len(images), 1, cfg.image.width))
    image = (
        tower("image", np.concatenate([first, patches + position], axis=1), causal=False)[:, 0]
        @ params["image/projection/kernel"]
    )
    words = params["text/token/table"][tokens] + params["text/position"]
    last = np.asarray(tokens).argmax(1)
    text = tower("text", words, causal=True)[np.arange(len(tokens)), last] @ params["text/projection/kernel"]
    expected = np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)], axis=1)
    found = outputs(Masked(functional(Clip, cfg), cfg), params | gates, images, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_legacy_flags_are_the_defects_of_the_release(small, params, images, tokens):
    cfg, leaves = small
    gates = masks.deterministic_gates(leaves)
    legacy = prune(cfg, params, gates, MaskConfig(legacy_proj_scale=True, legacy_drop_bias=True))
    exact = prune(cfg, params, gates)
    kept = gates["masks/text/embed"][gates["masks/text/embed"] > 0]
    np.testing.assert_allclose(
        legacy.params["text/projection/kernel"], kept[:, None] * exact.params["text/projection/kernel"], rtol=1e-6
    )
    assert (
        not legacy.params["image/blocks/attn/out/bias"][1].any() and exact.params["image/blocks/attn/out/bias"][1].any()
    )
    np.testing.assert_array_equal(
        legacy.params["image/blocks/attn/out/bias"][0], exact.params["image/blocks/attn/out/bias"][0]
    )
    model = functional(Clip, exact.cfg)
    assert (
        np.abs(outputs(model, legacy.params, images, tokens) - outputs(model, exact.params, images, tokens)).max()
        > 1e-3
    )


def test_padding_counts_for_nothing_and_gets_no_gradient(pruned, images, tokens):
    model = functional(Clip, pruned.cfg)
    expected = sum(
        np.prod([*leaf.in_layer(i)]) for leaf in model.spec.values() if leaf.layered for i in range(leaf.shape[0])
    )
    expected += sum(np.prod(leaf.shape) for leaf in model.spec.values() if not leaf.layered)
    assert parameters(model.spec)["total"] == expected < sum(x.size for x in pruned.params.values())

    def loss(params):
        features = model.apply(params, images, tokens)
        return features.image.sum() + features.text[0].sum()

    gradients = jax.jit(jax.grad(loss))(pruned.params)
    lossy = ("image/blocks/attn/", "text/blocks/mlp/")  # of each a layer has lost everything
    fresh = model.init(
        jax.random.key(0), [path for path, leaf in model.spec.items() if leaf.ragged and path.startswith(lossy)]
    )
    assert len(fresh) == 10
    for path, leaf in model.spec.items():
        if leaf.ragged:
            for values in (pruned.params, gradients, fresh):
                assert (
                    path not in values
                    or not np.asarray(values[path])[np.broadcast_to(~leaf.filled(), leaf.shape)].any()
                ), path
            assert np.asarray(gradients[path]).any() or leaf.count == 0, path


def test_a_pruned_model_goes_on_where_it_was(small, pruned):
    """Expansion and pruning at once: the same shape, and the weights up to the soft factor of an open gate."""
    cfg, _ = small
    spec = functional(Clip, cfg).spec
    full = graft(expand(pruned.cfg, cfg), Source(functional(Clip, pruned.cfg).spec, pruned.params), spec, None, None)
    leaves = masks.initial_masks(pruned.cfg, cfg)
    again = prune(cfg, {p: np.asarray(x) for p, x in full.items()}, masks.deterministic_gates(leaves))
    assert again.cfg == pruned.cfg
    for path, value in pruned.params.items():
        np.testing.assert_allclose(again.params[path], value, rtol=2e-5, atol=1e-7, err_msg=path)
    assert float(sparsity(cfg, leaves)) > 0.3


def test_widths_for_lanes_are_rounded_up(small, params):
    cfg, leaves = small
    rounded = prune(cfg, params, masks.deterministic_gates(leaves, round_to=8)).cfg
    plain = prune(cfg, params, masks.deterministic_gates(leaves)).cfg
    assert rounded.image.width % 8 == 0 and plain.image.width <= rounded.image.width < plain.image.width + 8
    assert all(a % 8 == 0 and b <= a < b + 8 for a, b in zip(rounded.text.hidden, plain.text.hidden, strict=True))
    assert rounded.image.heads == plain.image.heads


def test_a_tower_without_channels_is_refused(small):
    _, leaves = small
    with pytest.raises(InputError, match="masks/text/embed: every channel is closed"):
        masks.deterministic_gates(leaves | {"masks/text/embed": np.full(24, -20.0)})


def test_the_constraint_reaches_its_target(small):
    """Masks and multipliers as trained, against a task that would rather keep everything: within a hundredth."""
    cfg, _ = small
    how = MaskConfig(prune_step=1500, target=0.4, warmup=500)
    spec = masks.mask_spec(cfg)
    optimizer = mask_optimizer(Config(student=cfg, masks=how, optim=OptimConfig(clip=None)), spec)

    def loss(leaves, step):
        removed = sparsity(cfg, leaves)
        return constraint(removed, how.target_at(step), leaves) + 2 * removed, removed

    def step(carry, n):
        leaves, state = carry
        gradients, removed = jax.grad(loss, has_aux=True)(leaves, n)
        updates, state = optimizer.update(gradients, state, leaves)
        return (masks.clip_log_alphas(optax.apply_updates(leaves, updates)), state), removed

    leaves = {path: jnp.asarray(value) for path, value in masks.initial_masks(cfg, cfg).items()}
    (leaves, _), removed = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(1500)))(
        (leaves, optimizer.init(leaves))
    )
    assert float(removed[-1]) == pytest.approx(0.4, abs=0.01) and float(removed[100]) < 0.1
    assert float(leaves["masks/image/linear"]) > masks.MULTIPLIER


def test_masks_say_that_a_donor_has_another_activation(cfg, remarks):
    expand(cfg, cfg)
    assert remarks() == []
    expand(cfg, replace(cfg, text=replace(cfg.text, activation="gelu")))
    (said,) = remarks()
    assert "the donor's activation is 'quick_gelu', the student's 'gelu'" in said and "student.text.activation" in said
