"""The environments of the processes of a job on this machine."""

import os
from pathlib import Path
from socket import create_server

ROOT = Path(__file__).parents[2]


def environments(count: int) -> list[dict[str, str]]:
    """One for each process, without what the tests' own process set for JAX."""
    with create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    clean |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "JAX_NUM_PROCESSES": str(count)}
    return [clean | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(i)} for i in range(count)]
