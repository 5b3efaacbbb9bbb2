"""Grafts of random plans, fresh rows and all, against numpy written out; joint axes; gradients of growing matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heirloom.common.errors import InputError
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.maps import even, every, first, matrix, pad, pick, resize, sided
from heirloom.common.surgery.plan import Plan, Source, apply

SIZES = {"layer": (3, 2), "embed": (4, 5), "head": (3, 4)}
FRESH_VALUE = -77.0


def init(paths, place):
    return {path: jnp.full((2, 5, 4, 2), FRESH_VALUE) for path in paths}


@st.composite
def maps(draw, axis):
    source, target = SIZES[axis]
    rows = draw(st.lists(st.integers(-1, source - 1), min_size=target, max_size=target))
    scale = draw(st.none() | st.lists(st.sampled_from([0.0, -1.5, 2.0]), min_size=target, max_size=target))
    return pick(rows, None if scale is None else np.array(scale, np.float32))


@settings(max_examples=15)
@given(st.fixed_dictionaries({axis: maps(axis) for axis in SIZES}))
def test_graft_of_a_random_plan_is_indexing_and_scaling(leaf, donor, chosen):
    source = donor({"w": ("layer embed -> head head_dim", (3, 4, 3, 2))})
    spec = {"w": leaf("layer embed -> head head_dim", 2, 5, 4, 2)}
    plan = Plan((("w", chosen),))
    got = np.asarray(graft(plan, source, spec, None, init)["w"])

    expected, inherited = source.values["w"], np.ones((2, 5, 4, 2), bool)
    for axis, map in enumerate(chosen[name] for name in SIZES):
        shape = [-1 if i == axis else 1 for i in range(4)]
        expected = expected.take(map.rows, axis)  # -1 takes any row: it is overwritten below
        expected = expected if map.scale is None else expected * map.scale.reshape(shape)
        inherited &= (map.rows >= 0).reshape(shape)
    np.testing.assert_array_equal(got, np.where(inherited, expected, np.float32(FRESH_VALUE)))

    if inherited.all():
        np.testing.assert_array_equal(apply(plan, source, spec)["w"], got)
    else:
        with pytest.raises(InputError, match="leaves rows fresh"):
            apply(plan, source, spec)


def test_four_heads_of_four_become_two_of_six(leaf, donor):
    """Weight selection on joint axes: uniformly spaced channels, whatever head they came from."""
    source, spec = donor({"q": ("embed -> head head_dim", (3, 4, 4))}), {"q": leaf("embed -> head head_dim", 3, 2, 6)}
    rows = [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15]
    got = apply(Plan((("q", {"head head_dim": pick(rows)}),)), source, spec)["q"]
    np.testing.assert_array_equal(got, source.values["q"].reshape(3, 16)[:, rows].reshape(3, 2, 6))


@given(scale=st.lists(st.sampled_from([0.5, 0.0, 3.0]), min_size=3, max_size=3))
def test_a_row_of_scale_zero_has_a_source(leaf, donor, scale):
    source, spec = donor({"w": ("embed", (4,))}), {"w": leaf("embed", 3)}
    map = pick([2, 0, 2], np.array(scale, np.float32))
    got = apply(Plan((("w", {"embed": map}),)), source, spec)["w"]
    np.testing.assert_array_equal(got, source.values["w"][[2, 0, 2]] * map.scale)
    assert map.fraction == sum(s != 0 for s in scale) / 3


def test_growing_matrices_on_both_sides_get_their_gradients(leaf, donor):
    """LiGO: one matrix widens what is read, another what is written, a third makes the layers."""
    source = donor({"w": ("layer embed -> embed", (2, 3, 3)), "b": ("layer embed", (2, 3))})
    spec = {"w": leaf("layer embed -> embed", 3, 4, 4), "b": leaf("layer embed", 3, 4)}
    rng = np.random.default_rng(1)
    grow = {"read": rng.normal(size=(4, 3)), "write": rng.normal(size=(4, 3)), "layer": rng.normal(size=(3, 2))}
    grow = {name: m.astype(np.float32) for name, m in grow.items()}

    def student(grow):
        embed = sided(matrix(grow["write"]), read=matrix(grow["read"]))
        return apply(Plan((("**", {"layer": matrix(grow["layer"]), "embed": embed}),)), source, spec)

    expected = np.einsum("lk,kio,ai,bo->lab", grow["layer"], source.values["w"], grow["read"], grow["write"])
    np.testing.assert_allclose(student(grow)["w"], expected, rtol=1e-5, atol=1e-6)

    def loss(grow):
        return sum(jnp.sum(jnp.sin(value)) for value in student(grow).values())

    gradient = jax.jit(jax.grad(loss))(grow)
    value = jax.jit(loss)
    for name, m in grow.items():
        direction = np.random.default_rng(2).normal(size=m.shape).astype(np.float32)
        ahead, behind = (value(grow | {name: m + step * direction}) for step in (5e-3, -5e-3))
        np.testing.assert_allclose(np.vdot(gradient[name], direction), (ahead - behind) / 1e-2, rtol=2e-3, atol=2e-3)


@st.composite
def linear(draw, axis):
    """A map without fresh rows, and the matrix it stands for."""
    source, target = SIZES[axis]
    halves = st.sampled_from([0.0, -1.5, 2.0])
    if draw(st.booleans()):
        values = np.array(draw(st.lists(halves, min_size=target * source, max_size=target * source)), np.float32)
        return matrix(values.reshape(target, source)), values.reshape(target, source)
    rows = draw(st.lists(st.integers(0, source - 1), min_size=target, max_size=target))
    scale = np.array(draw(st.lists(halves, min_size=target, max_size=target)), np.float32)
    return pick(rows, scale), np.eye(source, dtype=np.float32)[rows] * scale[:, None]


@settings(max_examples=20)
@given(chosen=st.fixed_dictionaries({axis: linear(axis) for axis in SIZES}), seed=st.integers(0, 99))
def test_the_gradient_of_a_random_plan_is_its_transpose(leaf, chosen, seed):
    spec = {"w": leaf("layer embed -> head head_dim", 3, 4, 3, 2)}
    target = {"w": leaf("layer embed -> head head_dim", 2, 5, 4, 2)}
    plan = Plan((("w", {axis: map for axis, (map, _) in chosen.items()}),))
    # Small whole numbers times halves: sums are exact in any order.
    rng = np.random.default_rng(seed)
    value, cotangent = (rng.integers(-9, 9, tree["w"].shape).astype(np.float32) for tree in (spec, target))

    def student(w):
        return apply(plan, Source(spec, {"w": w}), target)["w"]

    out, pull = jax.vjp(student, jnp.asarray(value))
    dense = [chosen[axis][1] for axis in SIZES]
    np.testing.assert_array_equal(out, np.einsum("kl,fe,gh,lehd->kfgd", *dense, value))
    np.testing.assert_array_equal(pull(jnp.asarray(cotangent))[0], np.einsum("kl,fe,gh,kfgd->lehd", *dense, cotangent))


@settings(max_examples=10)
@given(rows=st.lists(st.integers(0, 3), min_size=5, max_size=5), seed=st.integers(0, 99))
def test_masks_that_scale_rows_are_learned(leaf, rows, seed):
    """TinyCLIP's automatic method: the gradient of a mask gathers whatever its row touches, on the side it scales."""
    spec, target = {"w": leaf("embed -> embed", 4, 4)}, {"w": leaf("embed -> embed", 5, 5)}
    rng = np.random.default_rng(seed)
    value, cotangent = (rng.integers(-9, 9, tree["w"].shape).astype(np.float32) for tree in (spec, target))

    def student(mask):
        embed = sided(pick(rows), write=pick(rows, mask))
        return jnp.vdot(apply(Plan((("w", {"embed": embed}),)), Source(spec, {"w": value}), target)["w"], cotangent)

    gradient = jax.grad(student)(jnp.ones(5))
    np.testing.assert_array_equal(gradient, (value[np.ix_(rows, rows)] * cotangent).sum(0))


@pytest.mark.parametrize(
    ("map", "message"),
    [
        (pick([0, -2, 1]), "w: the rule 'w' picks row -2 of axis 'embed', the donor has 4"),
        (pick([0, 4, 1]), "w: the rule 'w' picks row 4 of axis 'embed', the donor has 4"),
        (pick([0, 1, 2], np.ones(2)), "w: the rule 'w' scales axis 'embed' by (2,) numbers for 3 rows"),
    ],
)
def test_rows_and_scales_that_do_not_fit(leaf, donor, map, message):
    with pytest.raises(InputError) as error:
        Plan((("w", {"embed": map}),)).resolve(donor({"w": ("embed", (4,))}), {"w": leaf("embed", 3)})
    assert str(error.value) == message


def test_every_and_even_differ_where_it_matters():
    assert every(12, 9).rows.tolist() == list(range(9))
    assert even(12, 9).rows.tolist() == [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert even(12, 6).rows.tolist() == [0, 2, 4, 7, 9, 11]
    for rule in (every, even):
        for target in (0, 13):
            with pytest.raises(ValueError, match=f"{target} of 12 rows"):
                rule(12, target)


@pytest.mark.parametrize(("source", "target"), [(7, 7), (7, 14), (14, 7), (1, 4), (2, 1)])
def test_resampling_keeps_constants_and_the_identity(source, target):
    m = resize(source, target).values
    assert m.shape == (target, source) and m.dtype == np.float32
    np.testing.assert_allclose(m.sum(1), 1, atol=1e-6)
    if source == target:
        np.testing.assert_array_equal(m, np.eye(source))


def test_maps_tell_in_words_what_they_do():
    assert str(first(3)) == "first 3"
    assert str(pad(2, 4)) == "first 2, 2 fresh"
    assert str(pick([2, 0], np.ones(2))) == "rows 2 0, scaled"
    assert str(pick(range(1, 21))) == "rows 1 2 3 4 5 6 ... 20"
    assert str(matrix(np.zeros((3, 2)))) == "matrix 3x2"
