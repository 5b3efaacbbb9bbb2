"""Zoos: thousands of small networks trained at once, with what they were trained on; and folders of foreign checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.checkpoint.unwrap import open_tensors, weights_files
from common.checkpoint.weights import read_json, staged, write_json
from common.errors import InputError, positive
from common.nn.functional import Functional
from weightgen.lora import PAIR, canonical_tensors
from weightgen.nets import NetConfig, net
from weightgen.tokens import TokenSpec, chunks, neurons, one_chunk

Params = dict[str, jax.Array]
ARRAYS = ("weights", "quality", "classes")  # of a zoo, a file each


@dataclass(frozen=True)
class FitConfig:
    """How each network of a zoo is trained: AdamW on softmax cross-entropy, the same for all."""

    steps: int = 100
    batch: int = 0
    """Examples a step; 0: all of them."""
    lr: float = 0.05
    weight_decay: float = 0.0
    """L2 penalty added to the loss, half its square norm times this."""
    at_once: int = 0
    """Networks under one `vmap`, group after group; 0: all. On a CPU small convolutions are quickest one by one."""

    def __post_init__(self) -> None:
        positive(self, "steps")


def fit_population(model: Functional, params: Params, x: jax.Array, y: jax.Array, cfg: FitConfig, key: jax.Array) -> Params:
    """Train every network on its own data under `vmap` and `scan`.

    params: leaves [member, ...]; x: [member, example, ...]; y: [member, example] int32, -1 for an example that is not there.
    """

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        there = y >= 0
        nats = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), jnp.maximum(y, 0))
        penalty = sum(jnp.sum(jnp.square(leaf)) for leaf in params.values())
        return jnp.sum(nats * there) / jnp.maximum(there.sum(), 1) + 0.5 * cfg.weight_decay * penalty

    optimizer = optax.adam(optax.cosine_decay_schedule(cfg.lr, cfg.steps))

    def one(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> Params:
        def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
            params, state = carry
            bx, by = x, y
            if cfg.batch:
                rows = jax.random.randint(jax.random.fold_in(key, i), (cfg.batch,), 0, len(x))
                bx, by = x[rows], y[rows]
            updates, state = optimizer.update(jax.grad(loss)(params, bx, by), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(cfg.steps))[0][0]

    keys = jax.random.split(key, len(x))
    return jax.lax.map(lambda member: one(*member), (params, x, y, keys), batch_size=cfg.at_once or len(x))


def initial_population(model: Functional, members: int, start: Literal["shared", "random"], key: jax.Array) -> Params:
    """`members` networks, all from one initialisation or each from its own: leaves [member, ...]."""
    if start == "shared":
        one = model.init(key)
        return {path: jnp.broadcast_to(leaf, (members, *leaf.shape)) for path, leaf in one.items()}
    return jax.vmap(model.init)(jax.random.split(key, members))


@dataclass(frozen=True)
class Zoo:
    """Trained networks on disk, memory-mapped: millions of them are read row by row.

    weights: [member, count] f32, each network's tokens without padding; quality: [member] f32, accuracy on data it was not trained
    on, or NaN; classes: [member, ways] int32, indices into the bank of pictures it was trained on, or empty.
    """

    weights: np.ndarray
    quality: np.ndarray
    classes: np.ndarray
    net: NetConfig | None
    spec: TokenSpec
    whole: TokenSpec | None = None
    """Where members are single chunks of checkpoints: how a checkpoint is cut into them."""

    def __len__(self) -> int:
        return len(self.weights)

    def tokens(self, rows: Any) -> np.ndarray:
        """Tokens [..., rows, length] f32 of the members at `rows`; only they are read."""
        return self.spec.padded(np.asarray(self.weights[rows]))

    def first(self, members: int) -> "Zoo":
        """The first `members` of them; nothing is read."""
        return replace(self, **{name: getattr(self, name)[:members] for name in ARRAYS})

    def save(self, folder: Path, *, beside: Callable[[Path], Any] | None = None, force: bool = False) -> None:
        """Write a zoo's folder; `beside(folder)` adds what travels along."""
        with staged(folder, force=force) as out:
            out.mkdir()
            for name in ARRAYS:
                np.save(out / f"{name}.npy", getattr(self, name))
            pieces = {name: spec and [asdict(p) for p in spec.pieces] for name, spec in (("pieces", self.spec), ("whole", self.whole))}
            write_json(out / "zoo.json", {"net": self.net and asdict(self.net)} | pieces)
            if beside:
                beside(out)


def flat(spec: TokenSpec, tokens: np.ndarray) -> np.ndarray:
    """[..., rows, length] -> [..., count]: the weights without the padding."""
    return np.asarray(tokens[..., spec.mask], np.float32)


def open_zoo(folder: Path) -> Zoo:
    """A zoo written by `Zoo.save`, memory-mapped. Raises InputError when it is none."""
    if not (folder / "zoo.json").is_file():
        raise InputError(f"{folder} is no zoo: it has no zoo.json (heirloom train weightgen/zoo --run {folder.parent} makes one)")
    about = read_json(folder / "zoo.json")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    cfg = NetConfig(**about["net"]) if about["net"] else None
    whole = TokenSpec.of(about["whole"]) if about.get("whole") else None
    return Zoo(**arrays, net=cfg, spec=TokenSpec.of(about["pieces"]), whole=whole)


def build(
    cfg: NetConfig,
    data: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    members: int,
    fit: FitConfig,
    *,
    start: Literal["shared", "random"] = "shared",
    chunk: int = 500,
    seed: int = 0,
    first: int = 0,
) -> Iterator[Params]:
    """Train a zoo chunk by chunk, so that it never has to be in memory; yields populations of `chunk` networks and a rest.

    first: where to begin, a multiple of `chunk`. data(first, last): x [member, example, ...] and y [member, example] of these members.
    """
    model = net(cfg)
    run = jax.jit(lambda params, x, y, key: fit_population(model, params, x, y, fit, key))
    key = jax.random.key(seed)
    for at in range(first, members, chunk):
        last = min(at + chunk, members)
        x, y = data(at, last)
        # Shared means shared by the whole zoo: the key does not depend on the chunk.
        begin = key if start == "shared" else jax.random.fold_in(key, at)
        params = initial_population(model, last - at, start, begin)
        yield run(params, x, y, jax.random.fold_in(key, 10**6 + at))


def import_folder(
    folder: Path, *, chunk: int | None = None, select: str = "", quality: Mapping[str, float] | None = None
) -> tuple[Zoo, tuple[str, ...]]:
    """A zoo of the checkpoints in a folder (safetensors or torch, one architecture), tensors read one at a time; and its tasks in words.

    quality: accuracy by file name; where it is not given and `quality.json` lies in the folder, that file. `tasks.json` there says what
    each file is for; a file it does not name, or all of them, are a task of that name. Pairs of low-rank adapters are made canonical.
    Raises InputError for a folder without checkpoints and for one of another shape.
    """
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    members = [path for path in paths if path.is_dir() or path.suffix in (".safetensors", ".pt", ".pth")]
    if not members:
        raise InputError(f"{folder} holds no checkpoints (.safetensors, .pt, .pth, or folders of them)")
    named = {name: read_json(folder / f"{name}.json") for name in ("quality", "tasks") if (folder / f"{name}.json").is_file()}
    quality, tasks = quality or named.get("quality", {}), named.get("tasks", {})
    checks: tuple[tuple[str, Any, Any, str], ...] = (("quality", quality, (int, float), "a number"), ("tasks", tasks, str, "words"))
    for name, values, kind, said in checks:
        if not isinstance(values, Mapping) or not all(isinstance(value, kind) for value in values.values()):
            raise InputError(f"{folder}/{name}.json must give {said} for each file: {{file name: {said}}}")
    spec = chunks(_tensors(members[0]), chunk, select=select)
    rows = np.zeros((len(members), spec.count), np.float32)
    for row, path in zip(rows, members, strict=True):
        try:
            row[...] = flat(spec, spec.flatten(_tensors(path)))
        except (KeyError, InputError) as error:
            raise InputError(f"{path} is of another architecture than {members[0]} ({error}); keep one architecture in a zoo") from error
    scores = np.array([quality.get(path.name, np.nan) for path in members], np.float32)
    words_of = [tasks.get(path.name, path.stem) for path in members]
    words = tuple(dict.fromkeys(words_of))
    return Zoo(rows, scores, np.array([[words.index(task)] for task in words_of], np.int32), None, spec), words


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, adapters in their canonical form."""
    tensors = {key: tensor for file in weights_files(path) for key, tensor in open_tensors(file).items()}
    return canonical_tensors(tensors) if any(PAIR.match(key) for key in tensors) else tensors


def by_chunk(zoo: Zoo) -> Zoo:
    """Each chunk a member of its own, known by its number."""
    rows = zoo.tokens(slice(None)).reshape(-1, zoo.spec.length)
    numbers = np.tile(np.arange(zoo.spec.rows, dtype=np.int32), len(zoo))[:, None]
    return Zoo(rows, np.repeat(zoo.quality, zoo.spec.rows), numbers, None, one_chunk(zoo.spec), zoo.spec)


def head_tokens(cfg: NetConfig) -> TokenSpec:
    """A head, an mlp or a cnn neuron by neuron."""
    return neurons(net(cfg).spec)
