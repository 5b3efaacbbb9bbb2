"""Layouts: strided views both ways, bit for bit, and strict about every tensor."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.surgery.layout import Layout, own_views
from heirloom.common.surgery.plan import Plan, Source, build

LAYOUT = Layout(
    "toy",
    (
        ("cls + grid", "pos", "1 embed + (grid_row grid_col) embed"),
        ("q/kernel + k/kernel", "layers.{layer}.in.weight"),
        ("q/bias + k/bias", "layers.{layer}.in.bias"),
        ("conv", "conv.weight", "embed channel patch_row patch_col"),
        ("table", "table", "vocab embed"),
        ("scale", "scale"),
    ),
    ignore=("*.buffer",),
    constant={"ids": np.arange(3)},
)


def spec(layers, embed, head, head_dim, grid, dtype):
    def leaf(axes, *shape):
        return Leaf(Axes.parse(axes), shape, np.dtype(dtype))

    return {
        "cls": leaf("-> embed", embed),
        "grid": leaf("grid_row grid_col -> embed", grid, grid + 1, embed),
        "q/kernel": leaf("layer embed -> head head_dim", layers, embed, head, head_dim),
        "k/kernel": leaf("layer embed -> head head_dim", layers, embed, head, head_dim),
        "q/bias": leaf("layer -> head head_dim", layers, head, head_dim),
        "k/bias": leaf("layer -> head head_dim", layers, head, head_dim),
        "conv": leaf("patch_row patch_col channel -> embed", 2, 2, 3, embed),
        "table": leaf("vocab -> embed", 5, embed),
        "scale": leaf("", *()),
    }


def foreign(spec, seed=0):
    rng = np.random.default_rng(seed)
    out = {key: np.asarray(rng.standard_normal(t.shape)).astype(t.dtype) for key, t in LAYOUT.foreign(spec).items()}
    return out | {"ids": np.arange(3)}


def bits(x):
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_round_trips_bit_for_bit_in_both_directions(layers, embed, head, head_dim, grid, dtype):
    model = spec(layers, embed, head, head_dim, grid, dtype)
    file = foreign(model)
    ours = {path: np.asarray(view) for path, view in LAYOUT.view(file, model).items()}
    assert {p: (x.shape, x.dtype) for p, x in ours.items()} == {
        p: (leaf.shape, leaf.dtype) for p, leaf in model.items()
    }
    back = {key: np.zeros_like(value) for key, value in file.items()}
    for path, view in LAYOUT.view(back, model).items():
        view.write(ours[path])
    for key in file.keys() - {"ids"}:
        np.testing.assert_array_equal(bits(back[key]), bits(file[key]))


@pytest.mark.parametrize(("first", "other"), [("float16", "float32"), ("bfloat16", "float16"), ("float32", "float64")])
def test_layers_of_different_dtypes_keep_their_values(first, other):
    model = spec(2, 4, 3, 2, 2, np.float32)
    file = foreign(model)
    large = {"float32": 1e30, "float16": 6e4, "float64": 1e300}[other]  # more than the first layer's dtype holds
    file["layers.0.in.weight"] = file["layers.0.in.weight"].astype(first)
    file["layers.1.in.weight"] = np.full((12, 4), large, other)
    view = LAYOUT.view(file, model)["q/kernel"]
    np.testing.assert_array_equal(np.asarray(view)[1], np.full((4, 3, 2), large, other))
    np.testing.assert_array_equal(np.asarray(view)[0], view.layer(0))
    one = {"q/kernel": replace(model["q/kernel"], dtype=view.dtype)}
    line = Plan((("**", {}),)).resolve(Source(one, {"q/kernel": view}), one).lines[0]
    np.testing.assert_array_equal(build(line)[1], view.layer(1))


def test_leaves_of_different_dtypes_share_a_tensor_that_holds_both():
    model = spec(2, 4, 3, 2, 2, np.float32)
    model["q/kernel"] = replace(model["q/kernel"], dtype=np.dtype(np.float16))
    assert LAYOUT.foreign(model)["layers.0.in.weight"].dtype == np.float32


def test_where_each_number_goes():
    model = spec(2, 4, 3, 2, 2, np.float32)
    file = foreign(model)
    ours = LAYOUT.view(file, model)
    packed = file["layers.1.in.weight"]  # rows: q's heads, then k's; columns: embed
    np.testing.assert_array_equal(np.asarray(ours["k/kernel"])[1, :, 2, 1], packed[6 + 2 * 2 + 1])
    np.testing.assert_array_equal(np.asarray(ours["q/bias"])[0], file["layers.0.in.bias"][:6].reshape(3, 2))
    np.testing.assert_array_equal(np.asarray(ours["conv"])[1, 0, 2], file["conv.weight"][:, 2, 1, 0])
    np.testing.assert_array_equal(np.asarray(ours["cls"]), file["pos"][0])
    np.testing.assert_array_equal(np.asarray(ours["grid"])[1, 2], file["pos"][1 + 1 * 3 + 2])
    assert LAYOUT.keys(model)["k/kernel"] == "layers.{layer}.in.weight"


def test_views_are_strides_and_not_copies():
    model = spec(2, 4, 3, 2, 2, np.float32)
    file = foreign(model)
    for path, view in LAYOUT.view(file, model).items():
        assert all(any(np.shares_memory(part, tensor) for tensor in file.values()) for part in view.parts), path


def test_trap_layered_is_a_property_and_scalars_have_no_first_axis():
    model = spec(1, 2, 1, 1, 1, np.float32)
    views = LAYOUT.view(foreign(model), model)
    assert views["q/bias"].layered and views["q/bias"].shape == (1, 1, 1)
    assert not views["scale"].layered and views["scale"].shape == ()
    assert np.asarray(views["scale"]).shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("table"), r"file: tensor 'table' is missing"),
        (lambda f: f.update(table=f["table"].astype(np.int8)), r"tensor 'table' is int8, .*: is it quantised\?"),
        (lambda f: f.update({"tabel": f.pop("table")}), r"tensor 'table' is missing; did you mean 'tabel'"),
        (
            lambda f: f.update({"scales": f["scale"]}),
            r"tensor 'scales' is not part of this toy model; did you mean 'scale'",
        ),
        (
            lambda f: f.update({"table": f["table"][:3]}),
            r"tensor 'table' has shape \(3, 4\), this configuration needs \(5, 4\)",
        ),
    ],
)
def test_every_tensor_there_no_other_and_of_the_right_shape(change, message):
    model = spec(2, 4, 3, 2, 2, np.float32)
    file = foreign(model)
    change(file)
    with pytest.raises(InputError, match=message):
        LAYOUT.view(file, model, "file")


def test_buffers_may_be_there_or_not():
    model = spec(2, 4, 3, 2, 2, np.float32)
    file = foreign(model)
    assert LAYOUT.view(file | {"mask.buffer": np.zeros(3)}, model).keys() == model.keys()
    del file["ids"]
    assert LAYOUT.view(file, model).keys() == model.keys()


def test_a_leaf_without_a_row_is_a_mistake_of_the_layout():
    model = spec(2, 4, 3, 2, 2, np.float32) | {"new": Leaf(Axes.parse("embed"), (4,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match="no row for 'new'"):
        LAYOUT.foreign(model)


def test_our_own_files_are_views_too():
    model = spec(2, 4, 3, 2, 2, np.float32)
    tensors = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in model.items()}
    views = own_views(tensors, model, "file")
    assert {p: v.shape for p, v in views.items()} == {p: leaf.shape for p, leaf in model.items()}
    assert all(np.shares_memory(part, tensors[p]) for p, view in views.items() for part in view.parts)
    with pytest.raises(InputError, match="tensor 'cls' is missing"):
        own_views({p: t for p, t in tensors.items() if p != "cls"}, model, "file")


def test_stars_stand_for_the_numbers_of_listed_modules():
    kernel, bias = (
        Leaf(Axes.parse(axes), shape, np.dtype(np.float32)) for axes, shape in (("in -> out", (3, 2)), ("-> out", (2,)))
    )
    paths = ("up/0/resnets/0", "up/0/resnets/1", "up/11/resnets/0")
    model = {f"{path}/{leaf}": kernel for path in paths for leaf in ("q", "k")} | {
        f"{path}/bias": bias for path in paths[1:]
    }
    layout = Layout(
        "lists", (("up/*/resnets/*/q + up/*/resnets/*/k", "up_*.*.qk.weight"), ("up/*/resnets/*/bias", "*_of_*.bias"))
    )
    keys = {"up_0.0.qk.weight", "up_0.1.qk.weight", "up_11.0.qk.weight", "0_of_1.bias", "11_of_0.bias"}
    assert layout.foreign(model).keys() == keys
    file = {
        key: np.arange(12, dtype=np.float32).reshape(4, 3) if "qk" in key else np.ones(2, np.float32) for key in keys
    }
    np.testing.assert_array_equal(layout.view(file, model)["up/11/resnets/0/k"], [[6, 9], [7, 10], [8, 11]])
    assert layout.keys(model)["up/0/resnets/1/k"] == "up_0.1.qk.weight"
    with pytest.raises(ValueError, match="no row for 'up/0/mid'"):
        layout.foreign(model | {"up/0/mid": bias})


def test_ones_at_the_end_of_a_shape_make_no_difference_and_others_do():
    leaf = Leaf(Axes.parse("in -> out"), (3, 2), np.dtype(np.float32))
    layout, kernel = Layout("linear", (("kernel", "weight"),)), np.arange(6, dtype=np.float32).reshape(2, 3)
    for ones in ((), (1,), (1, 1)):
        file = {"weight": kernel.reshape(2, 3, *ones).copy()}
        view = layout.view(file, {"kernel": leaf})["kernel"]
        np.testing.assert_array_equal(view, kernel.T)
        view.write(np.zeros((3, 2), np.float32))
        assert not file["weight"].any()
    for shape in ((1, 2, 3), (3, 2), (6,), (2, 3, 2)):
        with pytest.raises(InputError, match="has shape"):
            layout.view({"weight": np.zeros(shape, np.float32)}, {"kernel": leaf})
    with pytest.raises(InputError, match="has shape"):
        own_views({"kernel": np.zeros((3, 2, 1), np.float32)}, {"kernel": leaf}, "file")


SHARED = Layout(
    "shared",
    (("w", "layers.{layer}.w"), ("embedder", "layers.{layer}.time")),
    constant={"position": np.linspace(0, 1, 4)},
)
SHARED_SPEC = {
    "w": Leaf(Axes.parse("layer embed -> hidden"), (3, 2, 4), np.dtype(np.float32)),
    "embedder": Leaf(Axes.parse("time -> embed"), (5, 2), np.dtype(np.float32)),
}


def test_what_a_file_repeats_in_every_layer_is_written_everywhere_and_read_once():
    rng = np.random.default_rng(0)
    file = {key: np.zeros(t.shape, t.dtype) for key, t in SHARED.foreign(SHARED_SPEC).items()}
    assert file["layers.2.time"].shape == (2, 5)
    embedder = rng.standard_normal((5, 2)).astype(np.float32)
    SHARED.view(file, SHARED_SPEC)["embedder"].write(embedder)
    for i in range(3):
        np.testing.assert_array_equal(file[f"layers.{i}.time"], embedder.T)
    view = SHARED.view(file, SHARED_SPEC)["embedder"]
    np.testing.assert_array_equal(np.asarray(view), embedder)
    assert view.shape == (5, 2)
    file["layers.1.time"][0, 0] += 1
    with pytest.raises(InputError, match="differs from layer to layer"):
        SHARED.check_values(file | {"position": SHARED.constant["position"]}, SHARED_SPEC)


def test_a_constant_may_be_absent_but_not_another():
    file = {key: np.zeros(t.shape, t.dtype) for key, t in SHARED.foreign(SHARED_SPEC).items()}
    with pytest.raises(InputError, match="'position' is fixed in shared models"):
        SHARED.check_values(file, SHARED_SPEC)
    file["position"] = SHARED.constant["position"] + 5e-6
    SHARED.check_values(file, SHARED_SPEC)
    del file["position"]
    SHARED.check_values(file, SHARED_SPEC)


def test_leaves_follow_one_another_behind_dimensions_of_one_and_layers_may_have_names():
    named = Layout(
        "named",
        (("cls + grid", "pos", "1 1 embed + 1 (grid_row grid_col) embed"), ("line", "block.{layer:base|slope}.weight")),
    )
    spec = {
        "cls": Leaf(Axes.parse("-> embed"), (3,), np.dtype("float32")),
        "grid": Leaf(Axes.parse("grid_row grid_col -> embed"), (2, 2, 3), np.dtype("float32")),
        "line": Leaf(Axes.parse("layer in -> out"), (2, 4, 5), np.dtype("float32")),
    }
    shapes = {key: tensor.shape for key, tensor in named.foreign(spec).items()}
    assert shapes == {"pos": (1, 5, 3), "block.base.weight": (5, 4), "block.slope.weight": (5, 4)}
    tensors = {key: np.random.default_rng(0).standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    views = named.view(tensors, spec)
    np.testing.assert_array_equal(np.asarray(views["cls"]), tensors["pos"][0, 0])
    np.testing.assert_array_equal(np.asarray(views["grid"]), tensors["pos"][0, 1:].reshape(2, 2, 3))
    np.testing.assert_array_equal(
        np.asarray(views["line"]), np.stack([tensors[f"block.{n}.weight"].T for n in ("base", "slope")])
    )
    empty = {key: np.zeros_like(value) for key, value in tensors.items()}
    for path, view in named.view(empty, spec).items():
        view.write(views[path])
    for key, value in tensors.items():
        np.testing.assert_array_equal(empty[key], value)
