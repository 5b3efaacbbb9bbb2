"""Compiling for TPUs on a machine without one: needs libtpu (extra `tpu`), no network."""

import pytest

from heirloom.common.compile import Topology, describe


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "tpu":
            item.add_marker(pytest.mark.tpu)


@pytest.fixture(scope="session", autouse=True)
def libtpu():
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu,test]'")


@pytest.fixture(scope="session")
def chip():
    """The first chip of a small slice, as a sharding."""
    import jax

    found = {}

    def chip(name):
        if name not in found:
            found[name] = jax.sharding.SingleDeviceSharding(describe(Topology.parse(SLICES[name])).devices[0])
        return found[name]

    return chip


SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
