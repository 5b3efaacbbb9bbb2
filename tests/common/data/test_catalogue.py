import json
import os
import subprocess
import sys

import pytest

from heirloom.common.cli import main
from heirloom.common.data import catalogue, indexing, tar_index
from heirloom.common.data.catalogue import FILE, catalogued, missing
from heirloom.common.data.indexing import Facts, index_all
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError
from heirloom.common.reading import Stamp


@pytest.fixture
def shards(tmp_path, write_tar, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return [write_tar(tmp_path / "data" / f"{n}.tar", 10 * n, 3 + n) for n in range(3)]


@pytest.fixture
def unread(monkeypatch):
    """`unread()`: from now on no shard may be read for its index."""
    return lambda: monkeypatch.setattr(tar_index, "_table", lambda *_: pytest.fail("a shard was read again"))


def test_facts_are_kept_in_one_file(shards, unread):
    first = catalogued(shards)
    assert first.samples.tolist() == [3, 4, 5] and first.pictures.all() and first.captions.all()
    unread()
    for shard in shards:
        next(shard.parent.glob(f"{shard.name}.index-*")).unlink()  # not needed at the start
    again = catalogued([shards[2], shards[0]])
    assert again.samples.tolist() == [5, 3] and again.stamp(0) == Stamp.of(shards[2]) == first.stamp(2)
    assert missing(shards) == []


def test_a_changed_shard_is_indexed_again_and_only_that(shards, write_tar, monkeypatch):
    catalogued(shards)
    write_tar(shards[1], 50, 7)
    read, real = [], tar_index._table
    monkeypatch.setattr(tar_index, "_table", lambda shard, mark: (read.append(shard), real(shard, mark))[1])
    assert missing(shards) == [1]
    assert catalogued(shards).samples.tolist() == [3, 7, 5] and read == [shards[1]]
    os.utime(shards[2], ns=(10**18, 10**18))
    assert open_source(SourceConfig(str(shards[0].parent)))[14]["text"] == "caption 24" and read == shards[1:]
    names = {path.name.split(".index-")[0] for path in shards[0].parent.glob("*.index-*")}
    assert names == {"0.tar", "1.tar", "2.tar"} and len(list(shards[0].parent.glob("*.index-*"))) == 3


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "empty", "another file", "gone"])
def test_a_damaged_catalogue_is_made_again_from_the_indexes(shards, unread, damage):
    catalogued(shards)
    file = shards[0].parent / FILE
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-30] ^= 1
    kinds = {"a flipped bit": bytes(flipped), "cut": whole[:-9], "empty": b"", "another file": b"x" * 99}
    file.unlink() if damage == "gone" else file.write_bytes(kinds[damage])
    unread()
    assert catalogued(shards).samples.tolist() == [3, 4, 5]
    assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", ["a flipped bit", "gone"])
def test_an_index_that_is_damaged_after_the_catalogue_is_made_again(shards, damage):
    source = open_source(SourceConfig(str(shards[0].parent)))
    index = next(shards[1].parent.glob("1.tar.index-*"))
    whole = index.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 1  # in the span of the last sample
    index.unlink() if damage == "gone" else index.write_bytes(bytes(flipped))
    assert source[6]["text"] == "caption 13" and index.read_bytes() == whole


def test_a_shard_that_changes_during_a_run_is_refused(shards, write_tar):
    source = open_source(SourceConfig(str(shards[0].parent)))
    write_tar(shards[1], 50, 7)
    with pytest.raises(InputError, match=r"1\.tar is not readable: it has changed since it was indexed"):
        source[3]
    assert source[0]["text"] == "caption 0"


def test_a_missing_shard_is_named(shards):
    with pytest.raises(InputError, match=r"data/3\.tar does not exist; did you mean '\d\.tar'\?$"):
        open_source(SourceConfig(f"{shards[0].parent}/{{0..3}}.tar"))


def test_other_processes_index_the_same(shards, monkeypatch):
    expected = [indexing.facts(shard) for shard in shards]
    for file in shards[0].parent.glob("*.index-*"):
        file.unlink()
    monkeypatch.setattr(indexing, "HERE", 0)
    monkeypatch.setattr(indexing, "facts", lambda shard: pytest.fail("indexed in this process"))
    count = []
    assert index_all(shards, [1, 1, 1], lambda: count.append(1)) == expected and len(count) == 3
    assert expected[2] == Facts(*Stamp.of(shards[2]).__dict__.values(), 5, True, True)
    shards[1].write_bytes(shards[1].read_bytes()[:700])
    with pytest.raises(InputError, match=r"1\.tar is (truncated|not readable)"):
        index_all(shards, [1, 1, 1])
    monkeypatch.setattr(indexing, "_SERVE", "import os; input(); os._exit(9)")
    with pytest.raises(InputError, match=r"0\.tar: the process that indexed it ended with code 9; run the command"):
        index_all(shards, [1, 1, 1])


def test_where_nothing_may_be_written_next_to_the_shards(shards, tmp_path, monkeypatch, unread):
    monkeypatch.setattr(catalogue.os, "access", lambda *_: False)
    catalogued(shards)
    assert sorted(path.name for path in shards[0].parent.iterdir()) == ["0.tar", "1.tar", "2.tar"]
    assert len(list((tmp_path / "cache").rglob(FILE))) == 1
    unread()
    assert catalogued(shards).samples.tolist() == [3, 4, 5]


def test_the_verb(shards, tmp_path, capsys):
    data = f"{shards[0].parent}/{{0..2}}.tar"
    assert main(["index", data, "--json", str(tmp_path / "out.json")]) == 0
    assert "3 shards, 12 samples; 3 shards indexed in " in capsys.readouterr().out
    about = json.loads((tmp_path / "out.json").read_text())
    assert (about["shards"], about["samples"], about["indexed"]) == (3, 12, 3)
    assert main(["index", data]) == 0 and "0 shards indexed" in capsys.readouterr().out
    assert main(["index", "emoji"]) == 2
    assert "emoji has no tar shards, and other data needs no index" in capsys.readouterr().err


def test_the_process_that_indexes_is_light():
    """It is started once a core: it must not import jax."""
    code = "import sys; import heirloom.common.data.indexing; print(*({'jax', 'pyarrow', 'grain'} & {*sys.modules}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
