"""Grafts: straight into shardings, only what is needed, into memory of their own."""

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.mesh import shardings
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.layout import Layout, Tensor, View
from heirloom.common.surgery.maps import FRESH, first, matrix, pad, pick, sided
from heirloom.common.surgery.plan import Plan, Source, apply

F32 = np.dtype(np.float32)
SOURCE = {
    "w": Leaf(Axes.parse("layer embed -> hidden"), (4, 256, 128), F32),
    "n": Leaf(Axes.parse("layer embed"), (4, 256), F32),
    "s": Leaf(Axes.parse(""), (), F32),
}
TARGET = {
    "w": Leaf(Axes.parse("layer embed -> hidden"), (2, 512, 64), F32),
    "n": Leaf(Axes.parse("layer embed"), (2, 512), F32),
    "s": Leaf(Axes.parse(""), (), F32),
}
PLAN = Plan(
    (
        ("s", FRESH),
        ("w", {"layer": pick([3, 1]), "embed": pad(256, 512), "hidden": first(64)}),
        ("n", {"layer": pick([3, 1]), "embed": pad(256, 512)}),
    )
)


def values():
    rng = np.random.default_rng(0)
    return {path: np.asarray(rng.standard_normal(leaf.shape), np.float32) for path, leaf in SOURCE.items()}


def init(paths, place, key=0):
    def make(key):
        return {p: jax.random.normal(jax.random.fold_in(key, i), TARGET[p].shape) for i, p in enumerate(sorted(paths))}

    return jax.jit(make, out_shardings={p: place[p] for p in paths})(jax.random.key(key))


def mesh(data, fsdp, tensor):
    return jax.make_mesh(
        (data, fsdp, tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp * tensor],
    )


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_sharded_equals_unsharded_bit_for_bit(shape):
    place = shardings(TARGET, mesh(*shape))
    plain = graft(PLAN, Source(SOURCE, values()), TARGET, None, init)
    spread = graft(PLAN, Source(SOURCE, values()), TARGET, place, init)
    for path in TARGET:
        np.testing.assert_array_equal(spread[path], plain[path])
        assert spread[path].sharding == place[path]
    kept = values()["w"][[3, 1], :, :64]
    np.testing.assert_array_equal(plain["w"][:, :256], kept)
    assert float(np.abs(plain["w"][:, 256:]).min()) > 0  # fresh rows come from the initialiser


# for each axis of the mesh the axis of the parameter it splits
SPLITS = st.tuples(*[st.none() | st.integers(0, 2)] * 3)
HALVES = st.sampled_from([0.0, -1.5, 2.0])


@st.composite
def maps(draw, source):
    """To eight rows from `source`: some fresh, some scaled, or mixed by a matrix."""
    if draw(st.booleans()):
        return matrix(
            np.array(draw(st.lists(HALVES, min_size=8 * source, max_size=8 * source)), np.float32).reshape(8, source)
        )
    rows = draw(st.lists(st.integers(-1, source - 1), min_size=8, max_size=8))
    return pick(
        rows, np.array(draw(st.lists(HALVES, min_size=8, max_size=8)), np.float32) if draw(st.booleans()) else None
    )


@settings(max_examples=15)
@given(st.tuples(maps(4), maps(5), maps(6)), SPLITS)
def test_a_random_plan_gives_the_same_bits_in_any_sharding(chosen, splits):
    names = ("data", "fsdp", "tensor")
    layout = [tuple(name for name, axis in zip(names, splits, strict=True) if axis == i) or None for i in range(3)]
    place = {"w": NamedSharding(mesh(2, 2, 2), PartitionSpec(*layout))}
    source, target = (Leaf(Axes.parse("layer embed -> hidden"), shape, F32) for shape in ((4, 5, 6), (8, 8, 8)))
    plan = Plan((("w", dict(zip(source.axes.names, chosen, strict=True))),))
    # Small whole numbers times halves: sums are exact in whatever order a block adds them.
    donor = Source({"w": source}, {"w": np.random.default_rng(0).integers(-9, 9, source.shape).astype(np.float32)})
    fresh = np.arange(512, dtype=np.float32).reshape(8, 8, 8) + 0.25

    def init(paths, place):
        return {"w": jax.device_put(fresh, place["w"])}

    plain, spread = (
        graft(plan, donor, {"w": target}, None, init)["w"],
        graft(plan, donor, {"w": target}, place, init)["w"],
    )
    np.testing.assert_array_equal(spread, plain)
    assert spread.sharding == place["w"]
    assert spread.sharding.shard_shape((8, 8, 8)) == tuple(8 >> sum(axis == i for axis in splits) for i in range(3))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=2), st.booleans())
def test_graft_equals_apply(layers, dense):
    target = {"w": Leaf(Axes.parse("layer embed -> hidden"), (2, 256, 128), F32)}
    layer = matrix(np.eye(4, dtype=np.float32)[layers]) if dense else pick(layers)
    plan, source = Plan((("w", {"layer": layer}),)), Source({"w": SOURCE["w"]}, {"w": values()["w"]})
    np.testing.assert_array_equal(graft(plan, source, target, None, init)["w"], apply(plan, source, target)["w"])


class Recording:
    """A donor's array that remembers how often it was indexed and how many elements were taken."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads, self.elements = array, array.shape, array.dtype, 0, 0

    def __getitem__(self, index):
        out = self.array[index]
        self.reads += 1
        self.elements += out.size
        return out


def test_trap_replicas_share_what_was_read():
    # make_array_from_callback asks once per device.
    recorded = Recording(values()["n"])
    place = {"n": NamedSharding(mesh(8, 1, 1), PartitionSpec())}
    target = {"n": SOURCE["n"]}
    graft(Plan((("n", {}),)), Source({"n": SOURCE["n"]}, {"n": recorded}), target, place, init)
    assert recorded.reads == 1


def test_only_the_slices_a_device_holds_are_read():
    recorded = Recording(values()["w"])
    place = {"w": NamedSharding(mesh(1, 8, 1), PartitionSpec(None, "fsdp"))}
    target = {"w": Leaf(Axes.parse("layer embed -> hidden"), (2, 128, 128), F32)}
    plan = Plan((("w", {"layer": pick([0, 2]), "embed": first(128)}),))
    graft(plan, Source({"w": SOURCE["w"]}, {"w": recorded}), target, place, init)
    assert recorded.reads == 8 and recorded.elements == 2 * 128 * 128  # each element of the student once, nothing more


def test_trap_a_memory_map_is_not_aliased(tmp_path):
    # A CPU array over an aligned map would change with the file.
    file = tmp_path / "w.bin"
    np.ones((4, 256, 128), np.float32).tofile(file)
    mapped = np.memmap(file, np.float32, "r+", shape=(4, 256, 128))
    spec = {"w": SOURCE["w"]}
    for source in (mapped, View(tuple(mapped), True)):
        got = graft(Plan((("w", {}),)), Source(spec, {"w": source}), spec, None, init)["w"]
        mapped[...] = 7
        assert float(got.max()) == 1.0
        mapped[...] = 1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_trap_scattered_rows_of_a_safetensors_file(tmp_path, dtype):
    # Slices of safetensors take no index arrays; maps give any rows of any axis, through a transposing layout too.
    rows, keys = [0, 3, 4, 9], [f"layers.{i}.fc.weight" for i in range(10)]
    file = {key: np.random.default_rng(i).standard_normal((10, 8)).astype(dtype) for i, key in enumerate(keys)}
    with create_safetensors(
        tmp_path / "m.safetensors", {key: Tensor(value.shape, value.dtype) for key, value in file.items()}
    ) as out:
        for key, value in file.items():
            out[key][...] = value
    layout = Layout("toy", (("w", "layers.{layer}.fc.weight"),))  # torch's order: written, then read
    spec = {"w": Leaf(Axes.parse("layer embed -> hidden"), (10, 8, 10), np.dtype(dtype))}
    target = {"w": Leaf(Axes.parse("layer embed -> hidden"), (4, 4, 4), np.dtype(dtype))}
    plan = Plan((("w", {"layer": pick(rows), "embed": pick([7, 0, 2, 0]), "hidden": pick(rows)}),))
    place = {"w": NamedSharding(mesh(2, 2, 2), PartitionSpec("data", "fsdp", "tensor"))}
    source = Source(spec, layout.view(open_safetensors(tmp_path / "m.safetensors"), spec))
    expected = np.stack([file[key].T for key in keys])[np.ix_(rows, [7, 0, 2, 0], rows)]
    for where in (None, place):
        got = np.asarray(graft(plan, source, target, where, init)["w"])
        assert got.dtype == dtype and got.tobytes() == expected.tobytes()


def test_trap_statistics_of_a_batch_norm_are_picked_and_never_scaled():
    # A mask over hidden units scales them where they are read. A variance under the mask would want its square.
    rng = np.random.default_rng(0)
    norm = {f"norm/{name}": "hidden" for name in ("scale", "bias", "mean", "variance")}
    axes = {"up/kernel": "embed -> hidden", **norm, "down/kernel": "hidden -> embed"}

    def spec(hidden):
        sizes = {"embed": 6, "hidden": hidden}
        parsed = {path: Axes.parse(text) for path, text in axes.items()}
        return {path: Leaf(a, tuple(sizes[name] for name in a.names), F32) for path, a in parsed.items()}

    values = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in spec(10).items()}
    values["norm/variance"] = rng.uniform(0.2, 3, 10).astype(np.float32)

    def net(p, x, mask=1.0):
        x = (x @ p["up/kernel"] - p["norm/mean"]) / np.sqrt(p["norm/variance"] + 1e-5) * p["norm/scale"] + p[
            "norm/bias"
        ]
        return np.maximum(x, 0) * mask @ p["down/kernel"]

    rows, kept = [0, 3, 4, 9], np.array([0.5, 2.0, 1.5, 0.25], np.float32)
    plan = Plan((("**", {"hidden": sided(pick(rows), read=pick(rows, kept))}),))
    student = {
        path: np.asarray(value) for path, value in graft(plan, Source(spec(10), values), spec(4), None, init).items()
    }
    for path in norm:
        np.testing.assert_array_equal(student[path], values[path][rows])
    mask, x = np.zeros(10, np.float32), rng.standard_normal((5, 6)).astype(np.float32)
    mask[rows] = kept
    np.testing.assert_allclose(net(student, x), net(values, x, mask), rtol=1e-5, atol=1e-5)


def test_fresh_leaves_are_the_initialisers_own_bits():
    got = graft(PLAN, Source(SOURCE, values()), TARGET, None, partial(init, key=5))
    place = dict.fromkeys(TARGET, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(got["s"], init(["w", "n", "s"], place, key=5)["s"])
