"""Indexes tar shards once in a job: the processes share the shards, and each tells the others what it found."""

import base64
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import jax

from heirloom.common.data import catalogue
from heirloom.common.data.indexing import Facts, index_all
from heirloom.common.data.sources import SourceConfig
from heirloom.common.data.sources.resolve import shards_of
from heirloom.common.data.tar_index import adopt, index_name, known_index
from heirloom.common.paths import Address, AnyPath, place
from heirloom.common.processes import exchange, together

PART = 2**24  # bytes of indexes that a process sends at a time


def share_indexes(cfg: object) -> None:
    """Indexes the tar shards that a config names, in a job of several processes. Every process calls it.

    Each process indexes its share on all its cores. What the others do not find, as their disks are their own, is sent
    to them. Raises InputError when a shard cannot be indexed.
    """
    if jax.process_count() == 1:
        return
    shards = list(dict.fromkeys(shard for data in _data(cfg) for shard in shards_of(data)))
    process, count = jax.process_index(), jax.process_count()
    new = [shards[i] for i in catalogue.missing(shards) if i % count == process]
    sizes = [stamp.size for stamp in catalogue.stamps(new)]
    found = together(lambda: index_all(new, sizes))
    _tell(dict(zip(new, found, strict=True)))


def _data(cfg: object) -> Iterator[SourceConfig]:
    """Yields the data that a config names, at any depth."""
    if isinstance(cfg, SourceConfig):
        yield cfg
    elif is_dataclass(cfg) and not isinstance(cfg, type):
        for one in fields(cfg):
            yield from _data(getattr(cfg, one.name))
    elif isinstance(cfg, tuple | list):
        for value in cfg:
            yield from _data(value)


def _tell(mine: dict[AnyPath, Facts]) -> None:
    """Sends facts and indexes to the processes that lack them. A shard of other size or time there is another one."""
    sent = [json.loads(text) for text in exchange(json.dumps([[str(s), *f] for s, f in mine.items()]).encode())]
    theirs = {place(name): Facts(*rest) for rows in sent for name, *rest in rows}
    now = dict(zip(theirs, catalogue.stamps(list(theirs)), strict=True))
    same = {shard: facts for shard, facts in theirs.items() if facts.stamp == now[shard]}
    folders = {shard.parent for shard in same if isinstance(shard, Address)}
    in_bucket = {folder.child(name) for folder in folders for name in folder.files(deep=False)}
    lacked = [
        str(shard)
        for shard, facts in same.items()
        if shard.parent / index_name(shard, facts.stamp) not in in_bucket and not known_index(shard, facts.stamp)
    ]
    asked = {name for text in exchange(json.dumps(lacked).encode()) for name in json.loads(text)}
    queue = [shard for shard in mine if str(shard) in asked]
    while True:
        parts = exchange(json.dumps(_taken(queue, mine)).encode())
        if not (rows := [row for text in parts for row in json.loads(text)]):
            break
        for name, data in rows:
            if name in lacked:
                adopt(place(name), same[place(name)].stamp, base64.b64decode(data))
    catalogue.keep(same)


def _taken(queue: list[AnyPath], facts: dict[AnyPath, Facts]) -> list[list[str]]:
    """Takes the next indexes from a queue, up to PART bytes, at least one: [shard, base64]."""
    out, size = list[list[str]](), 0
    while queue and size < PART:
        shard = queue.pop(0)
        if not (index := known_index(shard, facts[shard].stamp)):
            continue  # it was removed in this moment: who lacks it makes its own
        out.append([str(shard), base64.b64encode(index.file.read_bytes()).decode()])
        size += len(out[-1][1])
    return out
