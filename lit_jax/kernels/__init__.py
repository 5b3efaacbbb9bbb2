"""Implementations of linear attention for one kind of device each. Call them through `lit_jax.linear_attention`, which
defines the arguments.

An implementation is a module with the functions

    unsupported_reason(problem, head_dim, tokens, dtype, window) -> the reason why it does not support these shapes, or
    None forward(q, k, v, weight, bias, problem) -> out, residuals backward(q, k, v, weight, residuals, grad, problem)
    -> dq, dk, dv, dweight, dbias

q, k, v, out, grad: in `problem.layout`, where mosaic_gpu gets q and k rectified; weight [row, col, head * head_dim] and
bias [head * head_dim] of the depthwise branch, or None, whose gradients are f32.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from heirloom.common.errors import InputError

FeatureMap = Literal["relu", "none"]
Order = Literal["linear", "quadratic"]
Layout = Literal["bnhd", "bhdn"]

HEADS = (32, 64, 192, 256, 288, 384, 576)  # values of head_dim that the kernels were compiled for
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "gpu"}
_MEASURED = Path(__file__).parent / "measured.json"


class Terms(NamedTuple):
    """Constants of the formula. relu: whether the kernel applies ReLU to q and k, or gets features."""

    eps: float
    offset: float
    relu: bool


class Problem(NamedTuple):
    """Static arguments of a call."""

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
    """Sums over the tokens of each head, and each query's normaliser, saved for the backward pass; f32, but `state` has
    the dtype of q.
    """

    state: jax.Array  # [batch, head, head_dim, head_dim], keys and values centred
    key: jax.Array  # [batch, head, head_dim], mean feature
    value: jax.Array  # [batch, head, head_dim], mean value
    normaliser: jax.Array  # [batch, token, head]


class Choice(NamedTuple):
    """The implementation that `implementation=None` selects on this machine, and why."""

    implementation: str
    reason: str


def choice() -> Choice:
    """Select the implementation: a kernel only on the kinds of device in `measured.json`, where it was measured."""
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


def check_device(implementation: str | None, mesh: Mesh) -> None:
    """Raise InputError for a kernel of another platform than the mesh's."""
    platform = mesh.devices.flat[0].platform
    if (wanted := PLATFORMS.get(implementation or "", platform)) != platform:
        kernel = f"student.implementation {implementation} is a kernel for {wanted}"
        raise InputError(f"{kernel}, this is {platform}: set it to xla")


def describe() -> str:
    """Describe for `heirloom doctor` which implementation computes linear attention here, and why."""
    implementation, reason = choice()
    return f"linear attention by {implementation}: {reason}"


def unsupported_gpu(device: jax.Device) -> str | None:
    """Return why the kernels do not support this GPU; None on a Hopper, and on devices that are no GPU."""
    if device.platform == "gpu" and getattr(device, "compute_capability", None) != "9.0":
        return f"written for Hopper (compute capability 9.0), and this is {device.device_kind}"
    return None


@cache
def measured() -> dict[str, Any]:
    """Read the measurements by kind of device."""
    return json.loads(_MEASURED.read_text())


def merge(x: jax.Array) -> jax.Array:
    """Reshape [batch, head, ...] to [batch * head, ...]."""
    return x.reshape(-1, *x.shape[2:])
