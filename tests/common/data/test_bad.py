"""Bad records in training streams: replaced, counted, and named."""

import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from select import POLLIN, poll

import jax
import numpy as np
import pytest

from heirloom.common import reading
from heirloom.common.data import batches as batches_module
from heirloom.common.data.bad import BAD, Examples, WrongData, bad_records, first_good
from heirloom.common.data.batches import Batches
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pictures import decode_record
from heirloom.common.data.pipeline import Augment, PipelineConfig, evaluation_batches, training_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError, Remark

PRE = Preprocess(size=8, scale=(0.5, 1.0))
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Noise:
    """20 noisy pictures that carry their number; those of `broken` do not decode."""

    broken: tuple[int, ...] = ()

    def __len__(self):
        return 20

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (36, 30, 3), dtype=np.uint8)
        return {"key": f"noise {i}", "image": b"?" if i in self.broken else pixels, "number": np.asarray(i, np.int32)}


def stream(source, **settings):
    cfg = PipelineConfig(**{"batch": 6, **settings})
    return training_batches(source, cfg, Augment(PRE, None, 16))


def take(batches, count):
    """The next batches, and the bad records of each."""
    return [(batch, batches.delivered) for batch in itertools.islice(batches, count)]


def same(left, right):
    for (a, said), (b, other) in zip(left, right, strict=True):
        assert said == other and a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(reading, "WAITS", (0, 0))


def test_only_the_bad_rows_change():
    clean, found = take(stream(Noise()), 10), take(stream(Noise((4, 11))), 10)
    numbers = np.concatenate([batch["number"] for batch, _ in clean])
    ours = np.concatenate([batch["number"] for batch, _ in found])
    bad = np.isin(numbers, (4, 11))
    assert bad.sum() == 6  # 60 examples are three epochs
    np.testing.assert_array_equal(ours == numbers, ~bad)
    assert not set(ours) & {4, 11}
    pixels, others = (np.concatenate([batch["image"] for batch, _ in part]) for part in (clean, found))
    np.testing.assert_array_equal(others[~bad], pixels[~bad])
    said = [record for _, delivered in found for record in delivered.bad]
    assert {record.position for record in said} == set(np.flatnonzero(bad))
    reason = "this picture does not decode: its bytes are of no known picture format"
    reason = f"noise 4: {reason}; replace the file or take it out of the set"
    assert reason in {record.reason for record in said}
    first = {record.position: record.key for record in reversed(said)}
    assert first == {at: f"noise {numbers[at]}" for at in np.flatnonzero(bad)}
    assert {delivered.examples for _, delivered in found} == {6} and set(found[0][0]) == {"image", "number"}
    replaced = ours[bad]
    assert len(set(replaced)) > 1  # each position draws anew


def test_workers_hosts_and_restarts_replace_alike(monkeypatch):
    source = Noise((1, 2, 4, 11))
    whole = take(stream(source), 8)
    assert sum(len(delivered.bad) for _, delivered in whole) >= 10
    halted = stream(source)
    take(halted, 3)
    resumed = stream(source)
    resumed.restore(json.loads(json.dumps(halted.state())))
    same(take(resumed, 5), whole[3:])
    workers = stream(source, workers=2)
    workers.restore({**workers.state(), "batches": 2})
    same(take(workers, 4), whole[2:6])
    workers.close()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    halves = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        halves.append(take(stream(source), 8))
    for (batch, said), *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part["image"] for part, _ in parts]), batch["image"])
        assert tuple(record for _, part in parts for record in part.bad) == said.bad


def test_a_replacement_is_of_the_same_group():
    rows = Examples(Noise((4,)), lambda record, rng: {"x": decode_record(record), **record}, "replace", same_tens)
    chosen = {int(rows(4, np.random.default_rng(seed))["number"]) for seed in range(60)}
    assert chosen == {0, 1, 2, 3, 5, 6, 7, 8, 9}
    groups = np.arange(20) // 10
    found = training_batches(Noise((4, 15)), PipelineConfig(batch=10), Augment(PRE, None, 16), groups=groups)
    assert all(len(set(batch["number"] // 10)) == 1 for batch, _ in take(found, 10))


def same_tens(index):
    return range(index // 10 * 10, index // 10 * 10 + 10)


def test_replacements_that_are_bad_too():
    example = Augment(PRE, None, 16)
    broken = Examples(Noise(tuple(range(15))), example)
    made = broken(3, np.random.default_rng(0))
    tried = bad_records([made[BAD]], [7])
    assert made["number"] >= 15 and tried[0].key == "noise 3" and len({record.key for record in tried}) == len(tried)
    assert len(tried) > 1 and {record.position for record in tried} == {7}
    with pytest.raises(InputError, match=r"^noise 3: .* out of the set; so are the 8 records tried in its place, the"):
        Examples(Noise(tuple(range(20))), example)(3, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"^noise 3: .*; no other record can take its place$"):
        Examples(Noise((3,)), example, candidates=lambda index: [index])(3, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"^noise 3: this picture does not decode.*out of the set$"):
        Examples(Noise((3,)), example, "stop")(3, np.random.default_rng(0))


def test_a_first_look_passes_over_bad_records():
    assert first_good(Noise((0, 1)), decode_record).size == (30, 36)
    with pytest.raises(InputError, match="noise 0: this picture"):
        first_good(Noise(tuple(range(20))), decode_record)


def keys(source, example, bad="replace"):
    """What is said of each record: {number: (key, reason)}."""
    found = {}
    for i in range(len(source)):
        made = Examples(source, example, bad)(i, np.random.default_rng(i))
        if records := bad_records([made[BAD]], [i]):
            found[i] = records[0].key, records[0].reason
    return found


def test_what_is_bad_in_pictures_captions_and_labels(tmp_path, picture, no_waits):
    tokenizer = Tokenizer.train(["one"], 520)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i)[: 40 if i == 1 else None])
        (tmp_path / f"{i}.txt").write_bytes(b"\xff" if i == 2 else b"one")
    source = open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "3.png").unlink()
    found = keys(source, Augment(PRE, tokenizer, 16))
    assert sorted(found) == [1, 2, 3]
    assert all(key == f"{tmp_path}/{i}.png" for i, (key, _) in found.items())
    assert found[1][1].startswith(f"{tmp_path}/1.png: this picture does not decode")
    assert found[2][1].startswith(f"{tmp_path}/2.png: {tmp_path}/2.txt is not UTF-8 text")
    assert found[3][1] == f"{tmp_path}/3.png is not readable: No such file or directory"
    with pytest.raises(InputError, match=r"1\.png: this picture does not decode: .* take it out of the set$"):
        keys(source, Augment(PRE, tokenizer, 16), "stop")
    table = tmp_path / "labels.csv"
    table.write_text("image,caption,label\n" + "".join(f"0.png,one,{label}\n" for label in (0, 1, 2, -1)))
    pictures = Augment(PRE, None, 16)
    wrong = f"{table} row 4: {tmp_path}/0.png: its label is -1, the classes are 0 to 2; number the labels from 0"
    assert keys(open_labelled(SourceConfig(str(table)), "label", 3), pictures) == {3: (f"{table} row 4", wrong)}


def test_labels_from_one_are_not_bad_records_but_stop_the_run(tmp_path, picture):
    (tmp_path / "0.png").write_bytes(picture(0))
    table = tmp_path / "labels.csv"
    table.write_text("image,label\n" + "".join(f"0.png,{label}\n" for label in (1, 2, 3)))
    with pytest.raises(WrongData, match=r"its label is 3, the classes are 0 to 2; number the labels from 0$"):
        keys(open_labelled(SourceConfig(str(table)), "label", 3), Augment(PRE, None, 16))


def test_a_record_without_caption():
    tokenizer = Tokenizer.train(["one"], 520)

    class Some(Noise):
        def __getitem__(self, i):
            return super().__getitem__(i) | ({} if i == 3 else {"text": "one"})

    reason = "noise 3 has no caption; name its column with text, or add captions"
    assert keys(Some(), Augment(PRE, tokenizer, 16)) == {3: ("noise 3", reason)}


@pytest.mark.parametrize("kind", ["tar", "csv", "npy", "parquet"])
def test_a_file_that_changes_is_bad_and_not_misread(tmp_path, write_tar, picture, kind, no_waits):
    (tmp_path / "0.png").write_bytes(picture(9))
    file, columns = tmp_path / f"a.{kind}", {"image": "image"}
    if kind == "tar":
        write_tar(file, 0, 4)
    elif kind == "csv":
        file.write_text("image,caption\n" + "0.png,one\n" * 4)
    elif kind == "npy":
        np.save(file, np.zeros((4, 10, 12, 3), np.uint8))
        columns = {"image": "a", "text": ""}
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": [picture(i) for i in range(4)], "caption": ["one"] * 4}), file)
    source = pickle.loads(pickle.dumps(open_source(SourceConfig(str(tmp_path if kind == "npy" else file), **columns))))
    fresh = pickle.dumps(source)
    assert keys(source, Augment(PRE, None, 16)) == {}
    about = file.stat()
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))
    with pytest.raises(InputError, match="is not readable: it has changed since it was indexed; put it back") as error:
        pickle.loads(fresh)[2]
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(InputError, match="is not readable: No such file or directory"):
        pickle.loads(fresh)[2]
    name = {"tar": f"{file}:000002", "csv": f"{file} row 3", "npy": f"{tmp_path} row 2", "parquet": f"{file} row 2"}
    assert source.key(2) == name[kind]


def test_a_read_is_tried_three_times(no_waits, monkeypatch):
    slept, faults = [], [OSError(5, "Input/output error")] * 2
    monkeypatch.setattr(reading, "WAITS", (0.1, 0.4))
    monkeypatch.setattr(reading.time, "sleep", slept.append)

    def read():
        if faults:
            raise faults.pop()
        return b"data"

    assert reading.retried(read, "a.tar") == b"data" and slept == [0.1, 0.4]
    faults += [OSError(5, "Input/output error")] * 3
    with pytest.raises(InputError, match=r"^a\.tar is not readable: Input/output error$"):
        reading.retried(read, "a.tar")
    assert faults == []


def test_held_out_records_are_not_replaced():
    with pytest.raises(InputError, match="noise 4: this picture does not decode"):
        list(evaluation_batches(Noise((4,)), 4, PRE))


def test_a_limit_is_a_share():
    with pytest.raises(InputError, match=r"bad_limit is -0\.1: choose a finite number, 0 or more"):
        PipelineConfig(bad_limit=-0.1)


def test_a_dead_worker_is_started_again():
    expected = take(stream(Noise((4,))), 12)
    workers = stream(Noise((4,)), workers=2, prefetch=2)
    found = take(workers, 3)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.warns(Remark, match=r"prepares batches died and is started again: .* exit code -9"):
        found += take(workers, 9)
    workers.close()
    same(found, expected)


def test_workers_that_keep_dying_end_the_run_in_one_line():
    starts = []

    class Dead:
        def __init__(self, first):
            starts.append(first)

        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs above.")

        def close(self):
            pass

    with (
        pytest.warns(Remark),
        pytest.raises(InputError, match=r"died 4 times in a row: .* exit code -9; memory .*: lower pipeline\.workers"),
    ):
        next(Batches(Dead, {"seed": 0}))
    assert starts == [0] * (batches_module.RESTARTS + 1)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for a process of another parent, as on Linux")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = """if True:
    import multiprocessing, sys
    sys.path.insert(0, sys.argv[1])
    from test_bad import Noise, stream
    if __name__ == "__main__":
        batches = stream(Noise(), workers=2, prefetch=2)
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        sys.stdin.read()
    """
    script = tmp_path / "main.py"
    script.write_text(code)
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        handles = [os.pidfd_open(pid) for pid in children]
        parent.kill()
    assert len(handles) == 2
    for handle in handles:
        ended = poll()
        ended.register(handle, POLLIN)
        assert ended.poll(120_000)  # ms
        os.close(handle)
