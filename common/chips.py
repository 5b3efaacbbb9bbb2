"""Chips by the name that JAX gives them: peak FLOP/s, and for TPUs what `heirloom compile` needs to know."""

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a chip, or half of one (TPU v2, v3 and 7x).

    Peak FLOP/s are dense bf16, from the makers' data sheets.

    A chip without a `name` is no target of `heirloom compile`; its other fields are then 0.
    """

    kinds: tuple[str, ...]
    """Names that occur in `device_kind`."""
    flops: float
    name: str = ""
    """In the topologies of the TPU compiler."""
    hbm: float = 0.0
    """Bytes that the compiler gives to a program on one device."""
    bandwidth: float = 0.0
    """Bytes/s between HBM and one device."""
    link: float = 0.0
    """Bytes/s of a whole chip over all its links."""
    cores: int = 1
    """Devices of one chip in the compiler's list."""
    listed_flops: float = 0.0
    """FLOP/s of a device in the compiler's list, where that is another device: it lists both halves of a v4."""

    @property
    def compiled_flops(self) -> float:
        """FLOP/s of a device in the compiler's list."""
        return self.listed_flops or self.flops


# The first chip one of whose kinds fits counts. Memory as libtpu 0.0.42.1 refuses more; the rest of v5e and v5p as in
# cloud.google.com/tpu/docs, of the others unchecked. Halved where a chip has two devices.
CHIPS = (
    Chip(("TPU v2",), 22.5e12),
    Chip(("TPU v3",), 61.5e12),
    Chip(("TPU v4",), 275e12, "v4", 15.25 * GIB, 0.61e12, 300e9, cores=2, listed_flops=137e12),
    Chip(("TPU v5 lite", "TPU v5e"), 197e12, "v5e", 15.75 * GIB, 0.82e12, 200e9),
    Chip(("TPU v5p", "TPU v5"), 459e12, "v5p", 95.74 * GIB, 2.77e12, 600e9),
    Chip(("TPU v6 lite", "TPU v6e"), 918e12, "v6e", 31.25 * GIB, 1.64e12, 448e9),
    Chip(("TPU7x",), 1153e12, "tpu7x", 94.75 * GIB, 3.69e12, 1200e9, cores=2),
    Chip(("H100 PCIe",), 756e12),
    Chip(("H100", "H200"), 989e12),
    Chip(("B200",), 2250e12),
    Chip(("A100",), 312e12),
    Chip(("L4",), 121e12),
    Chip(("T4",), 65e12),
    Chip(("V100",), 125e12),
)
TARGETS = {chip.name: chip for chip in CHIPS if chip.name}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, or None where none is known (a CPU)."""
    words = re.split(r"[^A-Za-z0-9]", device_kind)  # an L40S is no L4
    fits = (chip for chip in CHIPS for kind in chip.kinds if kind in device_kind and kind.split()[-1] in words)
    return next((chip.flops for chip in fits), None)
