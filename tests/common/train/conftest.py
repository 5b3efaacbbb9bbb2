"""A network of two layers, small enough to check by hand."""

import jax
import numpy as np
import pytest

from heirloom.common.mesh import MeshConfig, start
from heirloom.common.surgery.axes import Axes, Leaf

SIZES = {"embed": 16, "hidden": 32}


def leaf(axes: str, *shape: int) -> Leaf:
    return Leaf(Axes.parse(axes), shape, np.dtype("float32"))


@pytest.fixture(scope="session")
def mesh():
    return start(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture
def spec():
    return {
        "up/kernel": leaf("embed -> hidden", 16, 32),
        "up/bias": leaf("hidden", 32),
        "down/kernel": leaf("hidden -> embed", 32, 16),
        "logit_scale": leaf(""),
    }


@pytest.fixture
def params(spec):
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=leaf.shape).astype("float32") for path, leaf in spec.items()}


@pytest.fixture
def batch():
    return {"x": np.random.default_rng(1).normal(size=(32, 16)).astype("float32")}


@pytest.fixture
def loss():
    """Mean squared error against the input; the batch may carry a factor that makes it non-finite."""

    def loss(params, batch, key, frozen):
        hidden = jax.nn.relu(batch["x"] @ params["up/kernel"] + params["up/bias"])
        error = hidden @ params["down/kernel"] * params["logit_scale"] - batch["x"]
        value = (error**2).mean()
        if "factor" in batch:
            value = value * batch["factor"].mean()
        return value, {"error": ((error**2).sum(), error.size)}

    return loss
