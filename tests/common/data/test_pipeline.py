import itertools
import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image

from heirloom.common.data.pipeline import (
    Augment,
    PipelineConfig,
    check_first_batch,
    evaluation_batches,
    host_rows,
    training_batches,
)
from heirloom.common.data.preprocess import Preprocess, denormalise, eval_image
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError

PRE = Preprocess(size=8, scale=(0.5, 1.0))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["caption one two better tag"], 530)


@dataclass
class Noise:
    """`count` noisy pictures that carry their number."""

    count: int
    broken: int = -1

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (36, 30, 3), dtype=np.uint8)
        image = b"nonsense" if i == self.broken else pixels
        texts = [f"one {i}", f"two {i}"] if i % 2 else f"one {i}"
        further = {"number": np.asarray(i, np.int32), "tags": [f"tag{n}" for n in range(10)], "concept": f"c{i // 2}"}
        return {"key": f"noise {i}", "image": image, "text": texts, **further}


def take(batches, count):
    return list(itertools.islice(batches, count))


def numbers(batches):
    return [b["number"].tolist() for b in batches]


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def stream(tokenizer, source=None, pre=PRE, mesh=None, **settings):
    cfg = PipelineConfig(**{"batch": 6, **settings})
    return training_batches(source or Noise(20), cfg, Augment(pre, tokenizer, 16, cfg.tags), mesh=mesh)


def test_batches_are_what_they_say(tokenizer):
    batch = next(stream(tokenizer))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((6, 8, 8, 3), np.float32),
        "text": ((6, 16), np.int32),
        "number": ((6,), np.int32),
    }
    assert set(next(stream(None))) == {"image", "number"}
    for row, number in zip(batch["text"], batch["number"], strict=True):
        assert tokenizer.decode(row).replace(" ", "") in (f"one{number}", f"two{number}")


def test_every_epoch_has_each_example_once_in_an_order_of_its_own(tokenizer):
    # 120 examples are six epochs; batches straddle them
    seen = np.concatenate(numbers(take(stream(tokenizer), 20))).reshape(6, 20)
    np.testing.assert_array_equal(np.sort(seen, axis=1), np.tile(np.arange(20), (6, 1)))
    assert len({tuple(epoch) for epoch in seen}) == 6
    other = np.concatenate(numbers(take(stream(tokenizer, seed=1), 20))).reshape(6, 20)
    assert not {tuple(epoch) for epoch in seen} & {tuple(epoch) for epoch in other}


def test_the_shuffle_crosses_shards(tmp_path, write_tar, tokenizer):
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", 25 * shard, 25, ("png", "txt", "json"))
    source = open_source(SourceConfig(str(tmp_path), columns=("score",)))
    first = next(stream(tokenizer, source, batch=40))["score"] * 2 // 25
    counts = np.bincount(first.astype(int), minlength=4)
    assert counts.sum() == 40 and counts.min() >= 4  # ten of each are expected


def test_a_picture_is_cropped_anew_in_every_epoch(tokenizer):
    batches = take(stream(tokenizer, Noise(6)), 8)
    crops = [b["image"][b["number"].tolist().index(3)].tobytes() for b in batches]
    assert len(set(crops)) == 8
    captions = {tokenizer.decode(b["text"][b["number"].tolist().index(3)]).split()[0] for b in batches}
    assert captions == {"one", "two"}


# 12 of 20 examples: inside the first epoch; 30: inside the second, across a border
@pytest.mark.parametrize("stop", [2, 5])
def test_resuming_is_exact(tokenizer, stop):
    whole = take(stream(tokenizer), stop + 4)
    halted = stream(tokenizer)
    take(halted, stop)
    state = json.loads(json.dumps(halted.state()))
    resumed = stream(tokenizer)
    resumed.restore(state)
    same(take(resumed, 4), whole[stop:])
    resumed.restore(state)  # and again, on an iterator that has run
    assert resumed.state() == state
    same(take(resumed, 1), whole[stop : stop + 1])
    assert resumed.state()["batches"] == stop + 1


def test_workers_change_nothing_and_resume(tmp_path, write_tar):
    tokenizer = Tokenizer.train(["caption"], 516)
    write_tar(tmp_path / "0.tar", 0, 10)
    source = open_source(SourceConfig(str(tmp_path), columns=("score",)))
    whole = take(stream(tokenizer, source, batch=4), 6)
    workers = stream(tokenizer, source, batch=4, workers=2)
    same(take(workers, 2), whole[:2])
    workers.restore({**workers.state(), "batches": 4})
    same(take(workers, 2), whole[4:])
    workers.close()
    none_ahead = stream(tokenizer, source, batch=4, workers=2, prefetch=0)
    same(take(none_ahead, 1), whole[:1])
    none_ahead.close()


def test_resuming_another_stream_is_refused(tokenizer):
    state = stream(tokenizer).state()
    with pytest.raises(InputError, match="examples was 20 and is 19 now"):
        stream(tokenizer, Noise(19)).restore(state)
    with pytest.raises(InputError, match="batch was 6 and is 5 now"):
        stream(tokenizer, batch=5).restore(state)
    with pytest.raises(InputError, match="seed was 0 and is 1 now"):
        stream(tokenizer, seed=1).restore(state)


def test_two_hosts_make_one_batch(tokenizer, monkeypatch):
    whole = take(stream(tokenizer), 5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    halves = []
    for host in range(2):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        halves.append(take(stream(tokenizer), 5))
    assert halves[0][0]["image"].shape[0] == 3
    same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)], whole)
    with pytest.raises(InputError, match="7 cannot be divided among 2 hosts"):
        stream(tokenizer, batch=7)


def one_device_mesh():
    return Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )


def test_on_a_mesh_batches_are_global_arrays(tokenizer):
    whole = take(stream(tokenizer), 5)
    placed = stream(tokenizer, mesh=one_device_mesh())
    batch = next(placed)
    assert isinstance(batch["image"], jax.Array) and batch["image"].sharding.spec == jax.sharding.PartitionSpec(
        ("data", "fsdp")
    )
    same([batch, *take(placed, 2)], whole[:3])
    assert placed.state()["batches"] == 3  # what was copied ahead does not count
    placed.restore({**placed.state(), "batches": 4})
    same(take(placed, 1), whole[4:])
    placed.close()


def test_on_several_devices_rows_are_split(tokenizer):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    placed = stream(tokenizer, mesh=mesh, batch=8)
    batch = next(placed)
    assert {s.data.shape for s in batch["text"].addressable_shards} == {(2, 16)}
    same([batch], take(stream(tokenizer, batch=8), 1))
    assert host_rows(8, mesh).tolist() == list(range(8))
    placed.close()
    with pytest.raises(InputError, match="6 cannot be divided into 4 parts"):
        stream(tokenizer, mesh=mesh)


def test_tags_are_appended_as_often_as_asked():
    tokenizer = Tokenizer.train([" ".join(f"tag{i}" for i in range(10))], 530)
    batches = training_batches(Noise(20), PipelineConfig(batch=20), Augment(PRE, tokenizer, 80, tags=0.3))
    texts = [tokenizer.decode(row) for batch in take(batches, 10) for row in batch["text"]]
    appended = np.array([text.count(",") for text in texts])
    assert abs(appended.mean() - 3) < 0.35  # 200 draws of ten tags: a standard error of 0.1
    assert all(text.count("tag") == n for text, n in zip(texts, appended, strict=True))


def test_loud_failures(tokenizer):
    with pytest.raises(InputError, match="20 examples, fewer than a batch of 21"):
        stream(tokenizer, batch=21)
    with pytest.raises(InputError, match=r"noise 4: this picture does not decode.*replace the file"):
        take(stream(tokenizer, Noise(20, broken=4), bad="stop"), 4)

    class Bare(Noise):
        def __getitem__(self, i):
            return {"key": f"bare {i}", "image": super().__getitem__(i)["image"]}

    with pytest.raises(InputError, match="bare 0 has no caption"):
        Augment(PRE, tokenizer, 16).check(Bare(20)[0])
    with pytest.raises(InputError, match="bare 0 has no tags"):
        Augment(PRE, None, 16, tags=0.5).check(Bare(20)[0])
    with pytest.raises(InputError, match="bare 0: its tags are 'dog, red'; store a list of strings"):
        Augment(PRE, None, 16, tags=0.5).check(Bare(20)[0] | {"tags": "dog, red"})


def test_evaluation_is_in_order_and_complete(tokenizer):
    source = Noise(10)
    batches = list(evaluation_batches(source, 4, PRE, tokenizer, 12))
    assert [len(b["image"]) for b in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([b["number"] for b in batches]), np.arange(10))
    assert [b["concept"].tolist() for b in batches][2] == ["c4", "c4"]
    assert batches[1]["owner"].tolist() == [4, 5, 5, 6, 7, 7]
    assert batches[1]["text"].shape == (6, 12) and tokenizer.decode(batches[1]["text"][2]).replace(" ", "") == "two5"
    np.testing.assert_array_equal(batches[2]["image"][1], eval_image(Image.fromarray(source[9]["image"]), PRE))
    assert set(next(evaluation_batches(source, 4, PRE))) == {"image", "number", "concept", "tags"}
    with pytest.raises(InputError, match="noise 4"):
        list(evaluation_batches(Noise(10, broken=4), 4, PRE))


def test_the_first_batch_can_be_looked_at(tokenizer, tmp_path):
    batch = next(stream(tokenizer))
    caption = check_first_batch(batch, tokenizer, tmp_path / "grid.png", PRE)
    assert caption.replace(" ", "")[3:] == str(batch["number"][0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (16, 24, 3)  # as many rows as there are pictures for
    np.testing.assert_array_equal(grid[8:16, :8], denormalise(batch["image"][3], PRE))  # second row, first column
    np.testing.assert_array_equal(grid[8:, 16:], denormalise(batch["image"][5], PRE))  # and the last
