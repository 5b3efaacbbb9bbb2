"""Plans: maps against the matrices they stand for, the traced form, and every way a plan can be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heirloom.common.errors import InputError
from heirloom.common.surgery import maps
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.surgery.layout import View
from heirloom.common.surgery.maps import FRESH, PerLayer, even, every, first, matrix, pad, pick, resize, sided
from heirloom.common.surgery.plan import Plan, Source, apply, build


def spec(**leaves):
    """name="axes|sizes" -> a spec of f32 leaves."""
    out = {}
    for path, text in leaves.items():
        axes, sizes = text.split("|")
        out[path] = Leaf(Axes.parse(axes), tuple(map(int, sizes.split())), np.dtype(np.float32))
    return out


def filled(spec, seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in spec.items()}


def one(plan, source, target):
    (line,) = plan.resolve(Source(source, filled(source)), target).lines
    return line


@st.composite
def picks(draw, source, target):
    rows = draw(st.lists(st.integers(0, source - 1), min_size=target, max_size=target))
    scale = draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, -2.0, 1.0]), min_size=target, max_size=target))
    return pick(rows, None if scale is None else np.array(scale, np.float32))


def one_hot(map, source):
    out = np.zeros((len(map.rows), source), np.float32)
    out[np.arange(len(map.rows)), map.rows] = 1 if map.scale is None else map.scale
    return out


@given(st.data())
def test_pick_is_its_one_hot_matrix(data):
    source, target = spec(w="layer embed -> hidden|3 5 4"), spec(w="layer embed -> hidden|2 6 3")
    chosen = {name: data.draw(picks(s, t)) for name, s, t in (("layer", 3, 2), ("embed", 5, 6), ("hidden", 4, 3))}
    dense = {name: matrix(one_hot(m, {"layer": 3, "embed": 5, "hidden": 4}[name])) for name, m in chosen.items()}
    picked = build(one(Plan((("w", chosen),)), source, target))
    multiplied = build(one(Plan((("w", dense),)), source, target))
    np.testing.assert_allclose(picked, multiplied, rtol=1e-6, atol=1e-6)
    if all(m.scale is None for m in chosen.values()):
        value = filled(source)["w"]
        np.testing.assert_array_equal(picked, value[np.ix_(*(m.rows for m in chosen.values()))])


@given(st.data())
def test_a_block_is_the_slice_of_the_whole(data):
    source, target = spec(w="layer embed -> head head_dim|3 5 4 3"), spec(w="layer embed -> head head_dim|4 6 2 6")
    plan = Plan(
        (
            (
                "w",
                {
                    "layer": data.draw(picks(3, 4)),
                    "embed": data.draw(picks(5, 6)),
                    "head head_dim": data.draw(picks(12, 12)),
                },
            ),
        )
    )
    index = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in (4, 6, 2, 6))
    line = one(plan, source, target)
    np.testing.assert_array_equal(build(line, index), build(line)[index])


@given(st.data())
def test_views_arrays_and_tracers_give_the_same(data):
    source, target = spec(w="layer embed -> hidden|3 5 4"), spec(w="layer embed -> hidden|2 6 3")
    plan = Plan(
        (("w", {"layer": data.draw(picks(3, 2)), "embed": data.draw(picks(5, 6)), "hidden": data.draw(picks(4, 3))}),)
    )
    value = filled(source)["w"]
    array = build(one(plan, source, target))
    view = build(plan.resolve(Source(source, {"w": View(tuple(value), True)}), target).lines[0])
    traced = jax.jit(lambda w: apply(plan, Source(source, {"w": w}), target)["w"])(value)
    np.testing.assert_array_equal(view, array)
    np.testing.assert_allclose(traced, array, rtol=1e-6)


def test_joint_axes_16_heads_of_72_become_4_of_288():
    source, target = spec(q="embed -> head head_dim|8 16 72"), spec(q="embed -> head head_dim|8 4 288")
    line = one(Plan((("q", {"head head_dim": first(16 * 72)}),)), source, target)
    np.testing.assert_array_equal(build(line), filled(source)["q"].reshape(8, 4, 288))


def test_a_map_may_differ_by_side():
    source = spec(w="embed -> embed|4 4", n="embed|4", b="-> embed|4")
    target = spec(w="embed -> embed|2 2", n="embed|2", b="-> embed|2")
    rows, z = [0, 3], np.array([2.0, 10.0], np.float32)
    plan = Plan((("**", {"embed": sided(pick(rows), write=pick(rows, z))}),))
    values = filled(source)
    got = {line.path: build(line) for line in plan.resolve(Source(source, values), target).lines}
    np.testing.assert_allclose(got["w"], values["w"][np.ix_(rows, rows)] * z, rtol=1e-6)  # written, scaled
    np.testing.assert_array_equal(got["n"], values["n"][rows])  # carried, only picked
    np.testing.assert_allclose(got["b"], values["b"][rows] * z, rtol=1e-6)


def test_maps_per_layer_against_a_loop():
    source, target = spec(w="layer embed -> hidden|3 4 5"), spec(w="layer embed -> hidden|2 4 3")
    inner = (pick([4, 0, 1]), pick([2, 2, 0], np.array([1.0, 3.0, 0.0], np.float32)))
    line = one(Plan((("w", {"layer": pick([2, 0]), "hidden": PerLayer(inner)}),)), source, target)
    value = filled(source)["w"]
    expected = np.stack([value[2][:, [4, 0, 1]], value[0][:, [2, 2, 0]] * np.array([1, 3, 0])])
    np.testing.assert_allclose(build(line), expected, rtol=1e-6)
    np.testing.assert_array_equal(build(line, (slice(1, 2), slice(1, 3), slice(0, 2))), build(line)[1:2, 1:3, 0:2])
    assert line.fraction == pytest.approx((1 + 2 / 3) / 2)  # a row scaled to zero is not inherited


def test_gradients_flow_into_the_matrix_and_equal_finite_differences():
    # TLEG: every layer a line between two genes.
    source, target = spec(w="layer embed -> hidden|2 3 4"), spec(w="layer embed -> hidden|5 3 4")
    values = filled(source)

    def loss(m):
        return jnp.sin(apply(Plan((("w", {"layer": matrix(m)}),)), Source(source, values), target)["w"]).sum()

    m = np.stack([np.ones(5), np.arange(5) / 5], 1).astype(np.float32)
    np.testing.assert_allclose(
        apply(Plan((("w", {"layer": matrix(m)}),)), Source(source, values), target)["w"],
        values["w"][0] + (np.arange(5, dtype=np.float32) / 5)[:, None, None] * values["w"][1],
        rtol=1e-5,
        atol=1e-6,
    )
    step = 1e-2
    numeric = [
        [(loss(m + step * _unit(i, j)) - loss(m - step * _unit(i, j))) / (2 * step) for j in range(2)] for i in range(5)
    ]
    np.testing.assert_allclose(jax.grad(loss)(m), numeric, rtol=2e-3, atol=2e-3)


def _unit(i, j):
    out = np.zeros((5, 2), np.float32)
    out[i, j] = 1
    return out


def test_ligo_widens_with_one_matrix_on_both_sides():
    source, target = spec(w="embed -> embed|3 3"), spec(w="embed -> embed|5 5")
    m, values = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32), filled(source)
    got = apply(Plan((("w", {"embed": matrix(m)}),)), Source(source, values), target)["w"]
    np.testing.assert_allclose(got, m @ values["w"] @ m.T, rtol=1e-5, atol=1e-6)


def test_tied_gradients_are_the_sum_of_untied_ones():
    # SWS: layers share rows inside the loss.
    source, target = spec(w="layer embed -> hidden|2 3 4"), spec(w="layer embed -> hidden|5 3 4")
    rows, values = [0, 0, 1, 1, 1], {k: jnp.asarray(v) for k, v in filled(source).items()}
    plan = Plan((("w", {"layer": pick(rows)}),))

    def loss(w):
        return (jnp.arange(1.0, 6)[:, None, None] * w**2).sum()

    tied = jax.grad(lambda v: loss(apply(plan, Source(source, v), target)["w"]))(values)["w"]
    untied = jax.grad(loss)(apply(plan, Source(source, values), target)["w"])
    np.testing.assert_array_equal(tied, np.stack([untied[:2].sum(0), untied[2:].sum(0)]))


@settings(max_examples=20)
@given(st.integers(2, 14), st.integers(1, 14))
def test_every_is_the_released_depth_rule(source, target):
    if target > source:
        with pytest.raises(ValueError):
            every(source, target)
        return
    step = source // target
    assert every(source, target).rows.tolist() == [i * step for i in range(target)]
    spread = even(source, target).rows.tolist()
    assert spread[0] == 0 and (target == 1 or spread[-1] == source - 1) and sorted(set(spread)) == spread


def test_resize_is_torchs_bicubic(golden):
    grid = golden("bicubic.npz")
    for name in ("up", "down"):
        source, target = grid["input"].shape[0], grid[name].shape[0]
        m = resize(source, target).values
        np.testing.assert_allclose(np.einsum("ij,kl,jlc->ikc", m, m, grid["input"]), grid[name], atol=2e-6)


def test_trap_minus_zero_survives():
    source = spec(w="embed|3", s="|")
    values = {"w": np.array([-0.0, 0.0, 1.0], np.float32), "s": np.array(-0.0, np.float32)}
    for given_values in (values, {k: View((v,), False) for k, v in values.items()}):
        lines = Plan((("**", {}),)).resolve(Source(source, given_values), source).lines
        got = {line.path: np.asarray(build(line)) for line in lines}
        assert np.signbit(got["w"]).tolist() == [True, False, False]
        assert np.signbit(got["s"]) and got["s"].shape == ()


def test_what_is_unused_and_how_much_is_inherited():
    source = spec(a="embed|4", b="embed|4", c="embed|4")
    target = spec(a="embed|4", b="embed|8")
    found = Plan((("a", FRESH), ("b", {"embed": pad(4, 8)}))).resolve(Source(source, filled(source)), target)
    assert found.unused == ("a", "c")
    assert [line.fraction for line in found.lines] == [0.0, 0.5]
    assert found.fraction == pytest.approx(4 / 12)
    assert [line.maps() for line in found.lines] == ["fresh", "embed: first 4, 4 fresh"]


W = "layer embed -> head head_dim|2 8 4 2"


@pytest.mark.parametrize(
    ("rules", "target", "message"),
    [
        ((), dict(a=W), r"a: no rule covers this parameter"),
        ((("b/**", {}), ("**", {})), dict(a=W), r"pattern 'b/\*\*' matches no parameter"),
        ((("**", {}),), dict(b=W), r"b: the donor has no such parameter.*give it a rule"),
        (
            (("**", {"heads": first(3)}),),
            dict(a=W),
            r"maps the axis 'heads', but none of its parameters has this axis; did you mean 'head'",
        ),
        (
            (("**", {}),),
            dict(a="layer embed -> head head_dim|2 8 3 2"),
            (
                r"a: axis 'head' is 4 in the donor and 3 here.*Add \"head\": first\(3\) to the rule '\*\*', or let the"
                r" student have 4"
            ),
        ),
        ((("**", {"head": first(3)}),), dict(a=W), r"a: axis 'head' is 4 here, but the rule '\*\*' picks 3 rows"),
        ((("**", {"head": pick([0, 1, 2, 9])}),), dict(a=W), r"picks row 9 of axis 'head', the donor has 4"),
        (
            (("**", {"head": matrix(np.ones((4, 5)))}),),
            dict(a=W),
            r"axis 'head' goes from 4 to 4, the matrix of rule '\*\*' is \(4, 5\)",
        ),
        (
            (("**", {}),),
            dict(a="layer embed -> hidden|2 8 4"),
            r"a: axes are 'layer embed -> head head_dim' in the donor",
        ),
        (
            (("**", {"head head_dim": first(8), "embed head": first(32)}),),
            dict(a=W),
            r"a: the rule '\*\*' maps 'head head_dim' and 'embed head', which share an axis",
        ),
        ((("**", {"head": PerLayer((first(4),))}),), dict(a=W), r"is for 1 layers"),
    ],
)
def test_each_mistake_names_the_leaf_and_the_way_out(rules, target, message):
    source = spec(a=W)
    with pytest.raises(InputError, match=message):
        Plan(rules).resolve(Source(source, filled(source)), spec(**target))


def test_apply_refuses_what_only_an_initialiser_can_fill():
    source, target = spec(a="embed|4"), spec(a="embed|6")
    with pytest.raises(InputError, match="leaves rows fresh"):
        apply(Plan((("a", {"embed": pad(4, 6)}),)), Source(source, filled(source)), target)


def test_rows_are_said():
    assert str(maps.pick([0, 2, -1])) == "rows 0 2, 1 fresh"
