"""The model itself: pooling, causality, what each option changes and what none of them may."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.axes import Axes
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig


def with_text(cfg, **changes):
    return replace(cfg, text=replace(cfg.text, **changes))


@pytest.fixture(scope="module")
def encode_text(params):
    """`encode_text(cfg)(tokens)` with the small model's parameters."""

    def make(cfg):
        encode = jax.jit(partial(functional(Clip, cfg).apply, method="encode_text"))
        return partial(encode, params)

    return make


def test_paths_and_axes_are_those_of_the_design(model, cfg):
    spec = model.spec
    assert str(spec["image/blocks/attn/query/kernel"]) == "layer=3 embed=32 -> head=4 head_dim=8"
    assert str(spec["image/blocks/attn/out/kernel"]) == "layer=3 head=4 head_dim=8 -> embed=32"
    assert str(spec["image/position"]) == "grid_row=2 grid_col=2 -> embed=32"
    assert str(spec["image/cls_position"]) == "-> embed=32"
    assert str(spec["text/token/table"]) == "vocab=40 -> embed=24"
    assert spec["image/blocks/attn_norm/scale"].axes == Axes.parse("layer embed")
    assert spec["logit_scale"].shape == ()
    assert {path.split("/")[0] for path in spec} == {"image", "text", "logit_scale"}


def test_features_are_unit_norm_and_the_scale_is_not_its_logarithm(features, cfg):
    for x in (features.image, features.text):
        assert x.shape == (4, cfg.joint) and x.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(features.scale, np.exp(2.5), rtol=1e-6)


def reference(params, cfg, images, tokens):
    """Both towers in float64 numpy, token by token and head by head, from the spec alone."""
    p = {path: np.asarray(value, np.float64) for path, value in params.items()}

    def norm(x, path, eps):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * p[f"{path}/scale"] + p[f"{path}/bias"]

    def blocks(x, tower, c, causal):
        for i in range(c.layers):
            at = {
                path.removeprefix(f"{tower}/blocks/"): v[i]
                for path, v in p.items()
                if path.startswith(f"{tower}/blocks/")
            }
            p.update({f"{tower}/now/{path}": v for path, v in at.items()})
            y = norm(x, f"{tower}/now/attn_norm", c.eps)
            heads = [np.einsum("te,ehd->htd", y, at[f"attn/{n}/kernel"]) for n in ("query", "key", "value")]
            q, k, v = (x + at[f"attn/{n}/bias"][:, None] for x, n in zip(heads, ("query", "key", "value"), strict=True))
            scores = q @ k.transpose(0, 2, 1) * (c.width // c.heads) ** -0.5
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights / weights.sum(-1, keepdims=True) @ v
            x = x + np.einsum("htd,hde->te", mixed, at["attn/out/kernel"]) + at["attn/out/bias"]
            y = norm(x, f"{tower}/now/mlp_norm", c.eps) @ at["mlp/up/kernel"] + at["mlp/up/bias"]
            y = y / (1 + np.exp(-1.702 * y))
            x = x + y @ at["mlp/down/kernel"] + at["mlp/down/bias"]
        return x

    def image(picture):
        s, kernel = cfg.image.patch, p["image/patch/project/kernel"]
        x = [p["image/cls"] + p["image/cls_position"]]
        for a, b in np.ndindex(cfg.image.grid, cfg.image.grid):
            x.append(np.einsum("rci,rcie->e", picture[a * s :, b * s :][:s, :s], kernel) + p["image/position"][a, b])
        x = np.array(x)
        x = blocks(norm(x, "image/pre_norm", cfg.image.eps), "image", cfg.image, False)
        return norm(x[0], "image/post_norm", cfg.image.eps) @ p["image/projection/kernel"]

    def text(ids):
        x = blocks(p["text/token/table"][ids] + p["text/position"], "text", cfg.text, True)
        return norm(x, "text/post_norm", cfg.text.eps)[ids.tolist().index(ids.max())] @ p["text/projection/kernel"]

    out = np.array([image(x) for x in images]), np.array([text(x) for x in tokens])
    return [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in out]


def test_both_towers_equal_the_formulas_written_out(params, cfg, images, tokens, features):
    image, text = reference(params, cfg, images, tokens)
    np.testing.assert_allclose(features.image, image, atol=2e-6)
    np.testing.assert_allclose(features.text, text, atol=2e-6)


@pytest.mark.parametrize("change", [dict(activation="gelu"), dict(activation="gelu_tanh"), dict(eps=1e-2)])
def test_activation_and_eps_matter(change, encode_text, cfg, tokens, features):
    assert float(jnp.abs(encode_text(with_text(cfg, **change))(tokens) - features.text).max()) > 1e-5


def test_nothing_after_the_end_of_text_matters(encode_text, cfg, tokens, features):
    """Causal attention, and pooling at the end: what follows may be any smaller ids."""
    encode, changed = encode_text(cfg), tokens.copy()
    for row in changed:
        end = row.argmax()
        row[end + 1 :] = np.random.default_rng(3).integers(1, cfg.text.vocab - 1, len(row) - end - 1)
    assert (changed != tokens).sum() == 7 + 5 + 2
    np.testing.assert_array_equal(encode(changed), encode(tokens))
    changed[:, 0] = 6
    assert (np.abs(encode(changed) - features.text).max(-1) > 1e-3).all()


def test_padding_with_zeros_or_with_the_end_of_text_is_the_same(encode_text, cfg, tokens):
    """Pooled at the first occurrence of the largest id."""
    end = cfg.text.vocab - 1
    padded = np.where(np.cumsum(tokens == end, axis=1) > 0, end, tokens)
    assert (padded == end).sum() == 8 + 6 + 3 + 1
    encode = encode_text(cfg)
    np.testing.assert_array_equal(encode(padded), encode(tokens))


def test_an_end_of_text_that_is_not_the_largest_id(encode_text, cfg, tokens):
    """With `eot` the text is pooled at the first occurrence of that id, whatever larger ones there are."""
    marked = tokens.copy()
    marked[:, 2] = 7
    marked[:, 4] = 7
    encode, by_size = encode_text(with_text(cfg, eot=7)), encode_text(cfg)
    assert (np.abs(np.asarray(encode(marked)) - by_size(marked)).max(-1)[1:] > 1e-3).all()
    changed = marked.copy()
    changed[:, 3:] = 11
    np.testing.assert_array_equal(encode(changed), encode(marked))
    changed[:, 1] = 13
    assert (np.abs(np.asarray(encode(changed)) - encode(marked)).max(-1) > 1e-4).all()


def test_images_are_read_row_by_row(model, params, images):
    """Swapping two patches swaps their positions: the features change, unless the position table is swapped along."""
    encode = jax.jit(lambda params, images: model.apply(params, images, method="encode_image"))
    swapped = np.concatenate([images[:, :, 8:], images[:, :, :8]], axis=2)  # the two columns of patches
    table = params | {"image/position": params["image/position"][:, ::-1]}
    assert float(jnp.abs(encode(params, swapped) - encode(params, images)).max()) > 1e-3
    np.testing.assert_allclose(encode(table, swapped), encode(params, images), atol=1e-6)


def test_recomputing_changes_no_gradient(cfg, params, images):
    def gradients(remat):
        model = functional(Clip, replace(cfg, remat=remat))

        def loss(params):
            return jnp.sum(jnp.sin(3 * model.apply(params, images, method="encode_image")))

        # Compiled without the optimiser's passes, which take most of the time and change nothing here.
        return jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(params)

    plain = gradients("none")
    assert float(jnp.abs(plain["image/patch/project/kernel"]).max()) > 1e-2
    for remat in ("full", "dots"):
        for path, gradient in gradients(remat).items():
            scale = max(float(jnp.abs(plain[path]).max()), 1)
            np.testing.assert_allclose(gradient, plain[path], atol=1e-5 * scale, err_msg=path)


def test_bfloat16_kernels_are_finite_and_near(model, params, images, tokens, features):
    half = {
        path: jnp.asarray(value, jnp.bfloat16 if path.endswith("kernel") else jnp.float32)
        for path, value in params.items()
    }
    out = jax.jit(model.apply)(half, images, tokens)
    for got, exact in ((out.image, features.image), (out.text, features.text)):
        assert got.dtype == jnp.float32
        assert 0 < float(jnp.abs(got - exact).max()) < 0.1
        assert float(jnp.sum(got * exact, -1).min()) > 0.99


def test_a_population_under_vmap_is_a_loop(model, draw, images, tokens):
    population = [draw(model.spec, seed) for seed in range(3)]
    stacked = {path: np.stack([member[path] for member in population]) for path in model.spec}
    together = jax.jit(jax.vmap(model.apply, in_axes=(0, None, None)))(stacked, images, tokens)
    one = jax.jit(model.apply)
    for i, member in enumerate(population):
        alone = one(member, images, tokens)
        np.testing.assert_allclose(together.image[i], alone.image, atol=2e-6)
        np.testing.assert_allclose(together.text[i], alone.text, atol=2e-6)
    assert float(jnp.abs(together.image[0] - together.image[1]).max()) > 0.1


def test_initial_values_are_those_of_the_papers_code():
    """Standard deviations, zeros and ones, and the scale."""
    cfg = ClipConfig(
        ImageConfig(size=64, patch=16, width=128, layers=2, heads=2, hidden=512),
        TextConfig(context=77, vocab=1000, width=64, layers=3, heads=1, hidden=256),
        joint=96,
    )
    model = functional(Clip, cfg)
    params = {path: np.asarray(value) for path, value in model.init(jax.random.key(0)).items()}
    np.testing.assert_allclose(params["logit_scale"], 2.65926, atol=1e-5)
    normal = {
        "image/cls": 128**-0.5,
        "image/position": 128**-0.5,
        "image/projection/kernel": 128**-0.5,
        "text/token/table": 0.02,
        "text/position": 0.01,
        "text/blocks/attn/query/kernel": 64**-0.5,
        "text/blocks/attn/out/kernel": 64**-0.5 * 6**-0.5,
        "text/blocks/mlp/up/kernel": 128**-0.5,
        "text/blocks/mlp/down/kernel": 64**-0.5 * 6**-0.5,
        "text/projection/kernel": 64**-0.5,
    }
    for path, std in normal.items():
        np.testing.assert_allclose(params[path].std(), std, rtol=4 * params[path].size ** -0.5, err_msg=path)
        assert abs(params[path].mean()) < 5 * std * params[path].size ** -0.5
    uniform = {
        "image/patch/project/kernel": (3 * 16**2) ** -0.5,
        "image/blocks/attn/query/kernel": (6 / (4 * 128)) ** 0.5,  # torch draws q, k and v as one matrix
        "image/blocks/mlp/up/kernel": 128**-0.5,
        "image/blocks/mlp/up/bias": 128**-0.5,
        "image/blocks/mlp/down/bias": 512**-0.5,
    }
    for path, bound in uniform.items():
        assert 0.95 * bound < np.abs(params[path]).max() <= bound, path
    for path, value in params.items():
        if path.endswith("norm/scale"):
            assert (value == 1).all()
        elif path.endswith("norm/bias") or ("attn" in path and path.endswith("bias")):
            assert (value == 0).all()


def test_fresh_parameters_are_the_same_bits_wherever_they_live(model):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    place = {"image/blocks/mlp/up/kernel": NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))}
    place |= {"text/token/table": NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))}
    whole, spread = model.init(jax.random.key(4), place), model.init(jax.random.key(4), place, place)
    for path, sharding in place.items():
        assert spread[path].sharding == sharding and not sharding.is_fully_replicated
        np.testing.assert_array_equal(spread[path], whole[path])


def test_heads_that_do_not_divide_the_width_are_refused(cfg):
    for heads in (0, 5):
        with pytest.raises(InputError, match=f"{heads} heads do not divide a width of 24"):
            functional(Clip, with_text(cfg, heads=heads))
