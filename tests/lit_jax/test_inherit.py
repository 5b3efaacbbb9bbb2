"""LiT from a DiT: exactly the leaves that the option names stay fresh."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source
from lit_jax.dit import Dit
from lit_jax.inherit import graft_attention
from lit_jax.pixart import PixArtConfig

PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def cut(donor_cfg, student_cfg, keep, draw):
    donor, student = functional(Dit, donor_cfg), functional(Dit, student_cfg)
    weights = draw(donor.spec)
    plan = graft_attention(donor_cfg, student_cfg, keep)
    source = Source(donor.spec, weights)
    return (
        weights,
        graft(plan, source, student.spec, None, partial(student.init, jax.random.key(3))),
        plan.resolve(source, student.spec),
    )


@pytest.fixture(scope="module")
def fresh(lit):
    return functional(Dit, lit).init(jax.random.key(3))


@pytest.mark.parametrize("keep", ["none", "o", "v", "kv", "qkv", "qkvo", "q"])
def test_changed_leaves(cfg, lit, draw, fresh, keep):
    weights, student, resolution = cut(cfg, lit, keep, draw)
    kept = {PROJECTIONS[p] for p in keep} if keep != "none" else set()
    for path, value in student.items():
        inherits = not path.startswith("blocks/attn") or path.split("/")[2] in kept
        expected = weights[path] if inherits else fresh[path]
        np.testing.assert_array_equal(
            np.ravel(value), np.ravel(expected), err_msg=path
        )  # heads regrouped: the same channels in a row
    left = {f"blocks/attn/{p}/{leaf}" for p in PROJECTIONS.values() if p not in kept for leaf in ("kernel", "bias")}
    assert set(resolution.unused) == left
    assert {line.path for line in resolution.lines if line.source is None} == left | {
        "blocks/attn/depthwise/kernel",
        "blocks/attn/depthwise/bias",
    }


def test_four_heads_become_two_channel_by_channel(cfg, lit, draw):
    weights, student, _ = cut(cfg, lit, "v", draw)
    key = "blocks/attn/value/kernel"
    assert weights[key].shape == (3, 32, 4, 8) and student[key].shape == (3, 32, 2, 16)
    np.testing.assert_array_equal(student[key][1, 5, 1, 3], weights[key][1, 5, 2, 3])
    np.testing.assert_array_equal(student[key][1, 5, 1, 11], weights[key][1, 5, 3, 3])


def test_without_filters_everything_can_be_kept(cfg, lit, draw):
    _, _, resolution = cut(cfg, replace(lit, filters="none"), "qkvo", draw)
    assert resolution.fraction == 1 and not resolution.unused


def test_a_lit_of_another_resolution_hands_all_of_it_down(lit, draw):
    weights, student, resolution = cut(lit, replace(lit, size=16), "all", draw)
    assert resolution.fraction == 1
    np.testing.assert_array_equal(student["blocks/attn/depthwise/kernel"], weights["blocks/attn/depthwise/kernel"])


@pytest.mark.parametrize("field", ["channels", "patch", "width", "layers", "hidden", "classes"])
def test_another_shape_is_refused_by_name(cfg, lit, field):
    with pytest.raises(InputError, match=f"student's {field} is"):
        graft_attention(cfg, replace(lit, **{field: 2 * getattr(lit, field)}))


def test_a_function_that_no_tensor_shows_is_refused(lit):
    with pytest.raises(InputError, match=r"student.features is 'gelu', the donor's 'relu': set it to this"):
        graft_attention(lit, replace(lit, features="gelu"), "all")
    sigma = PixArtConfig(size=64, interpolation=1.0)
    graft_attention(sigma, replace(sigma, size=128, interpolation=2.0))
    with pytest.raises(InputError, match=r"positions up to 64, the donor's up to 32: set student.interpolation to 2$"):
        graft_attention(sigma, replace(sigma, size=128))
