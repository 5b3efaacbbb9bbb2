"""Models whose layers are not stacked: more than ten of them, of different sizes, in the right order."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heirloom.common.nn.dense import Dense, normal, param
from heirloom.common.nn.functional import functional


class Chain(nnx.Module):
    """`n` linear maps, each a unit wider than the one before; `alike` makes all of one size."""

    def __init__(self, cfg: dict, *, rngs: nnx.Rngs):
        widths = [4] * (cfg["n"] + 1) if cfg["alike"] else range(2, cfg["n"] + 3)
        self.steps = nnx.List(Dense("embed -> hidden", dict(embed=a, hidden=b), rngs=rngs) for a, b in pairwise(widths))

    def __call__(self, x: jax.Array) -> jax.Array:
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("alike", [False, True])
def test_trap_eleven_blocks_stand_in_the_order_of_their_numbers(alike):
    """As strings "10" comes before "2": equal shapes would be permuted without a word, others mixed up."""
    model = functional(Chain, dict(n=11, alike=alike))
    assert [path for path in model.spec if path.endswith("kernel")] == [f"steps/{i}/kernel" for i in range(11)]
    params = {
        path: np.random.default_rng(i).normal(size=leaf.shape) for i, (path, leaf) in enumerate(model.spec.items())
    }
    x = np.ones((3, 4 if alike else 2))
    expected = x
    for i in range(11):
        expected = expected @ params[f"steps/{i}/kernel"] + params[f"steps/{i}/bias"]
    shuffled = {path: jnp.asarray(params[path], jnp.float32) for path in sorted(params)}
    np.testing.assert_allclose(model.apply(shuffled, x), expected, rtol=1e-4)


def test_the_spec_says_the_shape_of_every_block():
    spec = functional(Chain, dict(n=11, alike=False)).spec
    assert [spec[f"steps/{i}/kernel"].shape for i in range(11)] == [(i + 2, i + 3) for i in range(11)]
    assert all(str(spec[f"steps/{i}/bias"].axes) == "-> hidden" for i in range(11))


class Two(nnx.Module):
    def __init__(self, cfg: dict, *, rngs: nnx.Rngs):
        self.a = param("embed", cfg, normal(1.0), rngs)
        self.b = param("embed", cfg, normal(1.0), rngs)

    def both(self, x: jax.Array) -> jax.Array:
        return x * self.a[...] + self.b[...]


def test_trap_eager_values_are_not_handed_out():
    """Whatever XLA fuses, `init` gives what its compiled form gives: the same bits twice, others per key."""
    model = functional(Two, dict(embed=1000))
    one, again, other = (model.init(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one["a"], again["a"])
    assert not np.array_equal(one["a"], one["b"]) and not np.array_equal(one["a"], other["a"])
    eager = Two(dict(embed=1000), rngs=nnx.Rngs(params=jax.random.key(0)))
    np.testing.assert_allclose(one["a"], eager.a[...], rtol=1e-5)


def test_any_method_can_be_called():
    model = functional(Two, dict(embed=2))
    params = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([1.0, -1.0])}
    np.testing.assert_array_equal(model.apply(params, jnp.ones(2), method="both"), [3, 2])


def test_a_name_that_is_no_parameter_is_refused_by_init():
    with pytest.raises(ValueError, match="unknown parameter 'c'"):
        functional(Two, dict(embed=2)).init(jax.random.key(0), ["a", "c"])
