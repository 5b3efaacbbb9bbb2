"""The processes of a job: what they tell each other, and arrays that one of them has for all.

Every process makes the same calls in the same order, after `start`. With one process they cost nothing.
"""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from heirloom.common.errors import InputError

T = TypeVar("T")
BLOCK = 4096  # bytes: what is exchanged is padded to a multiple, so that few shapes are compiled
BEAT = 2.0  # seconds between two messages while some processes still work: a collective must not wait long


def exchange(data: bytes) -> list[bytes]:
    """Returns the data of all processes, by process."""
    if jax.process_count() == 1:
        return [data]
    own = np.frombuffer(data, np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own)))).reshape(-1)
    padded = np.zeros(max(1, -(-int(sizes.max()) // BLOCK)) * BLOCK, np.uint8)
    padded[: len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in process 0, for what is written or decided once, and returns its result, a JSON value, everywhere.

    The others wait, and fail where it fails: they raise an InputError that points to process 0.
    """
    if jax.process_count() == 1:
        return work()
    failure: Exception | None = None
    result: Any = None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    failed, result = json.loads(exchange(json.dumps([failure is not None, result]).encode())[0])
    if failure:
        raise failure
    if failed:
        raise InputError("process 0 failed in what the others wait for; its own message says why")
    return result


def together(work: Callable[[], T]) -> T:
    """Runs `work`, which may take long, in every process, and returns its own result once all are done.

    Where it fails in one of them, the others raise an InputError that says which and why.
    """
    if jax.process_count() == 1:
        return work()
    found = (pool := ThreadPoolExecutor(1)).submit(work)
    pool.shutdown(wait=False)
    while True:
        wait([found], BEAT)
        failure = found.exception() if found.done() else None
        why = f"on {socket.gethostname()} failed: {str(failure) or type(failure).__name__}" if failure else ""
        told = [json.loads(text) for text in exchange(json.dumps([found.done(), why]).encode())]
        if failure:
            raise failure
        for process, (_, why) in enumerate(told):
            if why:
                raise InputError(f"process {process} {why}")
        if all(done for done, _ in told):
            return found.result()


def gathered(value: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array in every process."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def whole_on_first(tree: Any) -> Any:
    """Returns a tree of whole arrays in process 0, and of None in the others."""
    first = jax.process_index() == 0

    def whole(value: Any) -> np.ndarray | None:
        array = gathered(value)  # one at a time: the others have no memory to spare for all
        return array if first else None

    return jax.tree.map(whole, tree)


def from_first(tree: Any, like: Any) -> Any:
    """Returns the arrays of process 0, to the bit, in the shardings of `like`, a tree of `jax.ShapeDtypeStruct`.

    tree: of arrays in the shapes of `like`; it is not read in the other processes.
    """
    leaves, structure = jax.tree.flatten(like)
    given = jax.tree.leaves(tree) if jax.process_index() == 0 else [None] * len(leaves)

    def placed(own: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.zeros(like.shape, like.dtype) if own is None else np.ascontiguousarray(own, like.dtype)
        # As bytes: the runtime adds up what the processes send, and -0.0 + 0.0 is 0.0.
        sent = np.asarray(multihost_utils.broadcast_one_to_all(array.reshape(-1).view(np.uint8)))
        value = sent.view(like.dtype).reshape(like.shape)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])

    return jax.tree.unflatten(structure, [placed(own, one) for own, one in zip(given, leaves, strict=True)])
