"""Linear attention written for one kind of device. `lit_jax.linear_attention` is the way in and says what the numbers mean.

An implementation is a module with the functions

    unsupported_reason(problem, head_dim, tokens, dtype, window) -> why it cannot take such shapes, or None
    forward(q, k, v, weight, bias, problem) -> out, residuals
    backward(q, k, v, weight, residuals, grad, problem) -> dq, dk, dv, dweight, dbias

q, k, v, out, grad: in `problem.layout`, where mosaic_gpu gets q and k rectified; weight [row, col, head * head_dim] and bias
[head * head_dim] of the depthwise branch, or None, whose gradients are f32.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

FeatureMap = Literal["relu", "none"]
Order = Literal["linear", "quadratic"]
Layout = Literal["bnhd", "bhdn"]

HEADS = (32, 64, 192, 256, 288, 384, 576)  # head_dim: those that the kernels were compiled for
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
_MEASURED = Path(__file__).parent / "measured.json"


class Terms(NamedTuple):
    """The numbers of the formula. relu: whether the kernel applies the feature map, or finds it applied."""

    eps: float
    offset: float
    relu: bool


class Problem(NamedTuple):
    """Everything about a call that is known before its arrays are."""

    eps: float
    offset: float
    feature_map: FeatureMap
    order: Order
    layout: Layout
    grid: tuple[int, int] | None

    @property
    def terms(self) -> Terms:
        return Terms(self.eps, self.offset, self.feature_map == "relu")


class Residuals(NamedTuple):
    """What one head knows of all tokens, and each query's normaliser; f32 but for `state`, which is rounded as it is used."""

    state: jax.Array  # [batch, head, head_dim, head_dim], keys and values centred
    key: jax.Array  # [batch, head, head_dim], mean feature
    value: jax.Array  # [batch, head, head_dim], mean value
    normaliser: jax.Array  # [batch, token, head]


class Choice(NamedTuple):
    """What `implementation=None` takes on this machine, and why."""

    implementation: str
    reason: str


def choice() -> Choice:
    """A kernel is taken only on a kind of device that it was measured on: the result is committed in `measured.json`."""
    device, platform = jax.devices()[0], jax.default_backend()
    kind = device.device_kind
    kernel = next((name for name, where in PLATFORMS.items() if where == platform), None)
    if kernel is None:
        return Choice("xla", f"there is no kernel for {platform}")
    if reason := unsupported_gpu(device):
        return Choice("xla", f"{kernel} is {reason}")
    if kind not in measured():
        return Choice("xla", f"{kernel} has not been measured on {kind}; select it by name")
    return Choice(kernel, f"measured on {kind}: {measured()[kind]}")


def describe() -> str:
    """For `heirloom doctor`: what computes linear attention here, and why."""
    implementation, reason = choice()
    return f"linear attention by {implementation}: {reason}"


def unsupported_gpu(device: Any) -> str | None:
    """What the kernels are and this GPU is not; None on a Hopper, and where there is no GPU."""
    if device.platform == "gpu" and getattr(device, "compute_capability", None) != "9.0":
        return f"written for Hopper (compute capability 9.0), and this is {device.device_kind}"
    return None


@cache
def measured() -> dict[str, Any]:
    """Device kind -> what was measured there."""
    return json.loads(_MEASURED.read_text())


def merge(x: jax.Array) -> jax.Array:
    """[batch, head, ...] -> [batch * head, ...]."""
    return x.reshape(-1, *x.shape[2:])
