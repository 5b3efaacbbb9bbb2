"""Adapters, alignment, Spectrum, greedy search, and baselines: numpy only."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.errors import InputError
from weightgen import align, baselines, llm
from weightgen.metrics import Scores, disagreement, error_overlap, head_accuracy, nearest_distance
from weightgen.zoo.lora import Adapter, canon, canonical_tensors
from weightgen.zoo.nets import NetConfig, net


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("read", "written"), [(20, 12), (20, 2), (3, 12)])
def test_an_adapter_has_one_form(read, written, rng):
    down, up = rng.standard_normal((4, read)), rng.standard_normal((written, 4))
    first = canon(Adapter(down, up))
    np.testing.assert_allclose(first.delta, up @ down, atol=1e-10)
    assert first.up.shape == up.shape and first.down.shape == down.shape
    np.testing.assert_allclose(first.up.T @ first.up, first.down @ first.down.T, atol=1e-10)  # balanced
    for seed in range(5):
        r = np.random.default_rng(seed).standard_normal((4, 4))
        other = canon(Adapter(np.linalg.inv(r) @ down, up @ r))
        np.testing.assert_allclose(other.up, first.up, atol=1e-8)
        np.testing.assert_allclose(other.down, first.down, atol=1e-8)


def test_adapters_of_a_checkpoint(rng):
    tensors = {"m.q.lora_A.weight": rng.standard_normal((2, 6)), "m.q.lora_B.weight": rng.standard_normal((5, 2)), "m.scale": np.ones(1)}
    fixed = canonical_tensors(tensors)
    np.testing.assert_allclose(
        fixed["m.q.lora_B.weight"] @ fixed["m.q.lora_A.weight"], tensors["m.q.lora_B.weight"] @ tensors["m.q.lora_A.weight"]
    )
    assert fixed["m.scale"] is tensors["m.scale"]
    with pytest.raises(InputError, match="only lora_A"):
        canonical_tensors({"m.q.lora_A.weight": tensors["m.q.lora_A.weight"]})


@pytest.mark.parametrize(("kind", "axes"), [("mlp", ["hidden"]), ("cnn", ["first", "second", "third", "hidden"])])
def test_matching_finds_a_permutation_back(kind, axes, rng):
    model = net(NetConfig(kind, 8 if kind == "mlp" else 1))
    tree = {path: rng.standard_normal(leaf.shape) for path, leaf in model.spec.items()}
    groups = align.symmetries(model.spec, axes)
    shuffled = align.permute(tree, groups, {g.name: rng.permutation(g.size) for g in groups})
    back = align.align(tree, shuffled, groups)
    assert all(np.array_equal(back[path], tree[path]) for path in tree)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(align.canonical(tree, groups).values(), align.canonical(shuffled, groups).values(), strict=True)
    )
    x = rng.standard_normal((3, 8) if kind == "mlp" else (3, 28, 28, 1)).astype(np.float32)
    one, two = (model.apply({k: v.astype(np.float32) for k, v in t.items()}, x) for t in (tree, shuffled))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="only write"):
        align.symmetries(model.spec, ["class"])


def test_spectrum_of_known_singular_values(rng):
    values = np.array([10.0, 4, 3, 2.5, 2, 1.5, 1, 0.5])
    left, right = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in (8, 16))
    low, high = np.quantile(values, (0.25, 0.75))
    eps = (high - low) / 1.349 * (1 + np.sqrt(0.5))
    expected = values[values > eps].sum() / values[values <= eps].sum() / 10
    assert llm.snr((left * values) @ right.T) == pytest.approx(expected, rel=1e-4)
    assert llm.snr(np.eye(4)) == pytest.approx(4.0)  # no noise at all: the sum below counts as 1
    assert llm.snr(np.zeros((3, 3))) == 0
    noise = np.linalg.svd(rng.standard_normal((256, 256)), compute_uv=False)
    low, high = np.quantile(noise, (0.25, 0.75))
    assert np.mean(noise > 2 * (high - low) / 1.349) == pytest.approx(0.23, abs=0.03)  # a ranking, not a test of noise


def test_ranking_a_checkpoint_reads_files_and_refuses_quantised_ones(tmp_path, rng):
    tensors = {f"h.{i}.w": rng.standard_normal((32, 32)).astype(np.float32) for i in range(4)}
    save_file(tensors | {"norm": np.ones(32, np.float32), "position_ids": np.arange(512)[None]}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="buffers: position_ids; norms, biases and other vectors: norm"):
        ranked = llm.rank_checkpoint(str(tmp_path))
    assert [r.kind for r in ranked] == ["h.w"] * 4
    assert [r.snr for r in ranked] == sorted((llm.snr(tensors[f"h.{i}.w"]) for i in range(4)), reverse=True)
    assert [r.name for r in llm.top(ranked, 0.25)] == [ranked[0].name]
    stacked = llm.unstacked({"blocks/up/kernel": np.stack(list(tensors.values()))[:4]})
    assert len(stacked) == 4 and len(llm.top(llm.rank(stacked))) == 1, "layers of a stack are of one kind"
    with pytest.raises(InputError, match="quantised"):
        llm.rank({"w": np.ones((32, 32), np.int8)})


def test_greedy_search_keeps_only_what_selection_likes():
    target = {"w": np.full((4, 4), 2.0), "v": np.zeros((4, 4))}
    base = {"w": np.zeros((4, 4)), "v": np.zeros((4, 4))}
    score = lambda p: -sum(float(np.abs(p[k] - target[k]).sum()) for k in p)  # noqa: E731
    found = llm.greedy(base, ["w", "v"], lambda name, tensor, rng: tensor + rng.standard_normal(), score, candidates=8)
    assert found.score == score(found.params) > score(base) and found.trials == 16
    assert [step.kept for step in found.steps] == [True, False]  # v was right, every change makes it worse
    assert np.array_equal(found.params["v"], base["v"]) and len(found.accepted) == 1
    half = llm.interpolate(base, found.params, 0.5)
    np.testing.assert_allclose(half["w"], found.params["w"] / 2)
    np.testing.assert_allclose(llm.soup([base, target])["w"], 1.0)
    with pytest.raises(InputError, match="no models"):
        llm.soup([])


def test_proposals_are_compared_at_one_norm(rng):
    tensor = rng.standard_normal((16, 8))
    row = llm.row_proposal({"a": tensor}, latent=4)
    for propose in (llm.noise_proposal(0.1), llm.matched(row, 0.1)):
        step = propose("a", tensor, np.random.default_rng(1)) - tensor
        assert np.linalg.norm(step) == pytest.approx(0.1 * np.linalg.norm(tensor), rel=1e-5)
    # What is drawn lies in the span of the components: rank 4, where noise has rank 8.
    assert np.linalg.matrix_rank(row("a", tensor, rng) - tensor, tol=1e-4) == 4


def test_kernel_density_draws_dimensions_independently(rng):
    latents = np.arange(50.0)[:, None] * np.ones((1, 6))
    drawn = np.rint(baselines.kde(latents, 2000, rng)).astype(int)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.08
    legacy = baselines.kde(latents, 100, rng, draws="legacy")
    assert np.ptp(legacy, axis=1).max() < 1e-6  # all dimensions of a draw: the same member and the same noise


def test_ridge_is_penalised_by_classes_it_has_not_seen(rng):
    classes = np.repeat(np.arange(20), 30)
    centre, answer = rng.standard_normal((20, 40)), rng.standard_normal((20, 3))
    x = centre[classes] + 0.01 * rng.standard_normal((600, 40))
    unrelated = baselines.Ridge.fit(x, answer[classes], classes, (1e-3, 1e6))
    related = baselines.Ridge.fit(x, x[:, :3], classes, (1e-3, 1e6))
    assert unrelated.penalty == 1e6 and related.penalty == 1e-3


def test_ridge_refuses_rows_of_one_class_alone(rng):
    with pytest.raises(InputError, match='to leave one out; here is one: set prior to "none"'):
        baselines.Ridge.fit(rng.standard_normal((5, 2)), rng.standard_normal((5, 3)), np.full(5, 7))


def test_ridge_falls_back_to_the_mean(rng):
    weights, noise = 5 + rng.standard_normal((50, 3)), rng.standard_normal((50, 4))
    found = baselines.Ridge.fit(noise, weights, np.arange(50), penalties=(1e6,))
    np.testing.assert_allclose(found(noise), np.broadcast_to(weights.mean(0), (50, 3)), rtol=1e-3)


def test_a_hypernetwork_bends_where_ridge_cannot(rng):
    told = rng.uniform(-2, 2, (600, 2)).astype(np.float32)
    weights = np.stack([np.abs(told[:, 0]), told[:, 1], np.full(600, 3)], axis=1)
    unseen, groups = rng.uniform(-2, 2, (200, 2)).astype(np.float32), np.arange(600)
    right = np.stack([np.abs(unseen[:, 0]), unseen[:, 1], np.full(200, 3)], axis=1)
    fits = baselines.hypernetwork(told, weights), baselines.Ridge.fit(told, weights, groups)
    bent, straight = (np.square(fit(unseen) - right).mean() for fit in fits)
    assert bent < 0.01 < 0.1 < straight


def test_prototypes_and_discriminants_are_nearest_means(rng):
    centres = 3 * rng.standard_normal((2, 4, 6))
    x = np.repeat(centres, 10, axis=1) + rng.standard_normal((2, 40, 6))
    y = np.broadcast_to(np.repeat(np.arange(4), 10), (2, 40))
    for heads in (baselines.prototype(centres[:, :, None]), baselines.discriminant(centres[:, :, None], np.eye(6))):
        nearest = np.linalg.norm(x[:, :, None] - centres[:, None], axis=-1).argmin(-1) == y
        np.testing.assert_allclose(head_accuracy(heads, x, y), nearest.reshape(2, 4, 10).mean((1, 2)))


def test_four_numbers_are_kept_apart(rng):
    x, y = rng.standard_normal((3, 40, 5)), np.broadcast_to(np.arange(40) % 4, (3, 40))
    samples = rng.standard_normal((6, 3, 4, 6))
    with pytest.raises(ValueError, match="oracle"):
        Scores.of(samples, (x, y), (x, y))
    scores = Scores.of(samples, (rng.standard_normal(x.shape), y), (x, y))
    every = head_accuracy(samples, x, y)
    np.testing.assert_allclose(scores.single, every.mean(0))
    np.testing.assert_allclose(scores.oracle, every.max(0))
    assert (scores.selected <= scores.oracle).all() and (scores.selected < scores.oracle).any()
    assert [name for name in scores.rows("g") if "oracle" in name] == ["g, best by test (oracle)"]


def test_novelty_and_diversity(rng):
    zoo = rng.standard_normal((10, 4))
    np.testing.assert_allclose(nearest_distance(zoo[3:4] + 0.1 * np.eye(4)[:1], zoo), 0.1, atol=1e-6)
    apart = np.linalg.norm(zoo[:, None] - zoo[None], axis=-1) + 1e9 * np.eye(10)
    np.testing.assert_allclose(nearest_distance(zoo, zoo, skip_self=True), apart.min(1))
    wrong = np.array([[1, 1, 0, 0]], bool)
    np.testing.assert_allclose(error_overlap(wrong, np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)), 2 / 3)
    assert disagreement(np.array([[0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3]])) == pytest.approx((0.5 + 0 + 0.5) / 3)
    json.dumps(disagreement(np.zeros((2, 3))))
