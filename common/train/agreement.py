"""Processes of a job compare what decides the result before the first step, and see that RUN is one place."""

import json
import secrets
import socket
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from heirloom.common.errors import InputError
from heirloom.common.processes import exchange
from heirloom.common.train.resume import difference

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "heirloom-jax")
OWN = ("pipeline.workers:", "pipeline.prefetch:")  # fields that each host may have for itself


def agree(facts: Mapping[str, Any]) -> None:
    """Raises InputError in every process unless all have the same facts: JSON values, such as the config."""
    texts = exchange(json.dumps(facts).encode())
    if len(set(texts)) == 1:
        return
    found = [json.loads(text) for text in texts]
    for process, other in enumerate(found):
        lines = [line for line in difference(found[0], other) if not any(own in line for own in OWN)]
        if lines:
            first = lines[0].strip().replace(" before, ", " in process 0, ").removesuffix(" now")
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise InputError(f"the processes of this job differ: {first} in process {process}{more}; start all alike")


def versions() -> dict[str, str]:
    """Returns the versions of the packages on which a result depends."""
    return {name: version(name) for name in PACKAGES}


def one_place(directory: Path, patience: float = 30.0) -> None:
    """Raises InputError in every process unless all see the folder that process 0 sees; creates it.

    patience: seconds until a file that process 0 wrote must be visible everywhere, as shared disks take a while.
    """
    if jax.process_count() == 1:
        return
    first, token, problem = jax.process_index() == 0, secrets.token_hex(8), ""
    if first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f".{token}").touch()
        except OSError as error:
            problem = f"{directory}: cannot be written ({error.strerror})"
    token, problem = json.loads(exchange(json.dumps([token, problem]).encode())[0])
    if problem:
        raise InputError(problem)
    file, limit = directory / f".{token}", time.monotonic() + patience
    while not (seen := file.exists()) and time.monotonic() < limit:
        time.sleep(0.2)
    told = [json.loads(text) for text in exchange(json.dumps([seen, socket.gethostname()]).encode())]
    if first:
        file.unlink(missing_ok=True)
    if blind := [f"process {i} on {host}" for i, (seen, host) in enumerate(told) if not seen]:
        wrote = f"what process 0 on {told[0][1]} wrote into {directory}"
        raise InputError(f"{blind[0]} does not see {wrote}: give a --run that is one place for all hosts")
