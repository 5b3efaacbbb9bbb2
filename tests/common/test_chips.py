"""Every number of the table of chips, as runs and `heirloom compile` read it."""

import pytest

from heirloom.common.chips import TARGETS, peak_flops

GIB = 2**30
# hbm, bandwidth, FLOP/s of a device in the compiler's list, link, cores
TARGETS_EXPECTED = {
    "v4": (15.25 * GIB, 0.61e12, 137e12, 300e9, 2),
    "v5e": (15.75 * GIB, 0.82e12, 197e12, 200e9, 1),
    "v5p": (95.74 * GIB, 2.77e12, 459e12, 600e9, 1),
    "v6e": (31.25 * GIB, 1.64e12, 918e12, 448e9, 1),
    "tpu7x": (94.75 * GIB, 3.69e12, 1153e12, 1200e9, 2),
}


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("cpu", None), ("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
        ("TPU7x", 1153e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", None),
        ("Tesla T4", 65e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA GB200", None),
    ],
)  # fmt: skip
def test_peak_of_a_device_kind(kind, expected):
    assert peak_flops(kind) == expected


def test_targets_of_the_compiler():
    found = {
        name: (chip.hbm, chip.bandwidth, chip.compiled_flops, chip.link, chip.cores) for name, chip in TARGETS.items()
    }
    assert found == TARGETS_EXPECTED
    assert list(found) == list(TARGETS_EXPECTED)  # the order in which an error lists them
