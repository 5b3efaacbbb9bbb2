"""A zoo of existing checkpoints, as the recipe makes it."""


import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.errors import InputError
from weightgen.tokens import TokenSpec, chunks
from weightgen.zoo.checkpoints import import_folder
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo, open_with_bank, open_zoo


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda z: z.weights.__setitem__((1, 0), np.nan), r"1 of 4 networks have NaN or infinity \(1\)"),
        (lambda z: z.classes.__setitem__((1, 0), -1), "of classes -1 to 2, its bank knows 3"),
        (lambda z: z.classes.__setitem__((1, 0), 3), "of classes 0 to 3, its bank knows 3"),
    ],
)
def test_a_zoo_is_looked_through_before_a_training(change, wrong, tmp_path):
    spec = chunks({"w": np.zeros(2, np.float32)})
    zoo = Zoo(np.ones((4, 2), np.float32), np.zeros(4, np.float32), np.int32([[0], [1], [2], [0]]), None, spec)
    change(zoo)
    zoo.save(tmp_path / "zoo", sidecars=Bank.numbers(("a", "b", "c")).save)
    with pytest.raises(InputError, match=wrong):
        open_with_bank(tmp_path / "zoo")
    np.save(tmp_path / "zoo" / "quality.npy", np.zeros(3, np.float32))
    with pytest.raises(InputError, match="damaged zoo"):
        open_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "weights.npy").unlink()
    with pytest.raises(InputError, match="damaged zoo"):
        open_zoo(tmp_path / "zoo")
    assert TokenSpec.of([{**vars(spec.pieces[0])}]) == spec



def test_a_folder_of_checkpoints_is_a_zoo(tmp_path):
    rng = np.random.default_rng(0)
    trees = [
        {"w": rng.standard_normal((3, 2)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
        for _ in range(3)
    ]
    for i, tree in enumerate(trees):
        save_file(tree, tmp_path / f"{i}.safetensors")
    (tmp_path / "quality.json").write_text('{"1.safetensors": 0.5}')
    zoo, words = import_folder(tmp_path)
    assert words == ("0", "1", "2") and zoo.classes.tolist() == [[0], [1], [2]]
    np.testing.assert_array_equal(np.nan_to_num(zoo.quality, nan=-1), np.float32([-1, 0.5, -1]))
    back = zoo.spec.unflatten(zoo.tokens(2), trees[0])
    assert all(np.array_equal(back[k], trees[2][k]) for k in back)
    zoo.save(tmp_path / "zoo")
    for folder in (tmp_path / "zoo", tmp_path):  # of a run, its zoo
        assert np.array_equal(open_zoo(folder).tokens(slice(None)), zoo.tokens(slice(None)))
    save_file({"w": np.zeros((4, 2), np.float32), "b": np.zeros(3, np.float32)}, tmp_path / "3.safetensors")
    (tmp_path / "zoo").rename(tmp_path.parent / "zoo-elsewhere")
    with pytest.raises(InputError, match=r"3\.safetensors is of another architecture"):
        import_folder(tmp_path)
