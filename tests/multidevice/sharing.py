"""One of two processes that index shards together: what it read itself goes to stdout, as JSON."""

import json
import os
import sys

import jax

from heirloom.common.data import catalogue, tar_index
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.mesh import MeshConfig, start
from heirloom.common.train.liveness import watch_each_other
from heirloom.common.train.sharing import share_indexes

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
read, real, access = [], tar_index._table, os.access
tar_index._table = lambda shard, mark: (read.append(shard.name), real(shard, mark))[1]
if sys.argv[2] == "own":  # nothing may be written next to the shards, and each process has a cache of its own
    catalogue.os.access = lambda *_: False
start(MeshConfig(), patience=60)
watch_each_other()
data = SourceConfig(sys.argv[1])
share_indexes([data, SourceConfig("emoji")])
shared = list(read)
source = open_source(data)
records = [source[i]["text"] for i in range(len(source))]
print(json.dumps({"read": shared, "later": read[len(shared) :], "records": records}))
