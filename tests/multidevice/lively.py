"""One of three processes: the last ends in the way it is told, the others wait for it in a collective operation."""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from heirloom.common.errors import InputError
from heirloom.common.mesh import MeshConfig, start
from heirloom.common.train.liveness import leave, wait_for_failure_of_others, watch_each_other

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
start(MeshConfig(), patience=60)
watch_each_other()
if jax.process_index() == 2:
    time.sleep(1)  # the others wait
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "fails":
        raise ZeroDivisionError("of one process")
    if sys.argv[1] == "refuses":
        print(f"heirloom: {InputError('the disk is full')}", file=sys.stderr)
        leave(2, "the disk is full")
try:
    multihost_utils.process_allgather(np.zeros(3))
except Exception:  # as the command does
    wait_for_failure_of_others()
    raise
