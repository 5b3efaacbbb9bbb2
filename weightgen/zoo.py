"""Zoos: thousands of small networks trained at once, with what they were trained on; and folders of foreign checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from heirloom.common.checkpoint.staging import staged
from heirloom.common.checkpoint.weights import read_json, write_json
from heirloom.common.errors import InputError, nearest, positive
from heirloom.common.nn.functional import Functional
from weightgen.data import Bank
from weightgen.foreign import listed
from weightgen.lora import pairs
from weightgen.members import Member, Read, adapter_record, agree, find_members, read_member
from weightgen.nets import NetConfig, net
from weightgen.tokens import TokenSpec, chunks, neurons, one_chunk, selected

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
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of imported checkpoints: the members' names, what was done to adapters, what was left alone."""

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
            about = {"about": dict(self.about)} if self.about else {}
            write_json(out / "zoo.json", {"net": self.net and asdict(self.net)} | pieces | about)
            if beside:
                beside(out)


def flat(spec: TokenSpec, tokens: np.ndarray) -> np.ndarray:
    """[..., rows, length] -> [..., count]: the weights without the padding."""
    return np.asarray(tokens[..., spec.mask], np.float32)


def open_zoo(folder: Path) -> Zoo:
    """A zoo written by `Zoo.save`, memory-mapped. Raises InputError when it is none, or its files do not fit together."""
    if not (folder / "zoo.json").is_file():
        raise InputError(f"{folder} is no zoo: it has no zoo.json (heirloom train weightgen/zoo --run {folder.parent} makes one)")
    about = read_json(folder / "zoo.json")
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        cfg = NetConfig(**about["net"]) if about["net"] else None
        whole = TokenSpec.of(about["whole"]) if about.get("whole") else None
        zoo = Zoo(**arrays, net=cfg, spec=TokenSpec.of(about["pieces"]), whole=whole, about=about.get("about", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is a damaged zoo ({str(error).splitlines()[0]}); make it again") from error
    shape, sizes = zoo.weights.shape, {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or shape[1:] != (zoo.spec.count,) or zoo.classes.ndim != 2:
        raise InputError(f"{folder} is a damaged zoo ({sizes}, rows of {shape[1:]} for {zoo.spec.count} weights); make it again")
    return zoo


def open_told(folder: Path) -> tuple[Zoo, Bank]:
    """A zoo and what its networks were trained on, looked through once before a training.

    Raises InputError for networks with NaN or infinity, and for networks without a class or with one that is not in the bank.
    """
    zoo, bank = open_zoo(folder), Bank.load(folder)
    if not len(zoo) or not zoo.classes.shape[1]:
        raise InputError(f"{folder} has {len(zoo)} networks of {zoo.classes.shape[1]} classes: nothing says what they are; make it again")
    step = max(2**24 // max(zoo.spec.count, 1), 1)
    bad = [at + int(i) for at in range(0, len(zoo), step) for i in np.flatnonzero(~np.isfinite(zoo.weights[at : at + step]).all(1))]
    if bad:
        known = zoo.about.get("members", [])
        named = listed(known[i] if len(known) == len(zoo) else str(i) for i in bad)
        raise InputError(f"{folder}: {len(bad)} of {len(zoo)} networks have NaN or infinity ({named}); make the zoo again without them")
    low, high = int(zoo.classes.min()), int(zoo.classes.max())
    if low < 0 or high >= len(bank.names):
        raise InputError(f"{folder}: its networks are of classes {low} to {high}, its bank knows {len(bank.names)}; make the zoo again")
    if not np.isfinite(bank.features).all():
        raise InputError(f"{folder}: its bank of features has NaN or infinity; make the zoo again")
    return zoo, bank


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
    """A zoo of the checkpoints in a folder (safetensors, torch or numpy, one architecture), read one at a time; and its tasks in words.

    quality: accuracy by file name; where it is not given and `quality.json` lies in the folder, that file. `tasks.json` there says what
    each file is for; a file it does not name, or all of them, are a task of that name. Pairs of low-rank adapters are made canonical,
    their scale inside. `zoo.about` has the members, what was done to them, and `notes`: what to tell the user.
    Raises InputError for a folder without checkpoints, for members of other shapes or modules, with NaN or infinity, or quantised.
    """
    members, left = find_members(folder)
    names = [member.path.name for member in members]
    quality, tasks = (_by_name(folder, name, names, quality if name == "quality" else None) for name in ("quality", "tasks"))
    first = read_member(members[0])
    spec = _cut(members[0], first, chunk, select)
    rows = np.zeros((len(members), spec.count), np.float32)
    read, faults = [], {}
    for row, member in zip(rows, members, strict=True):
        own = first if member is members[0] else read_member(member)
        same_tensors(spec, own.tensors, select, member.path, members[0].path)
        with np.errstate(over="ignore"):  # of f64, and looked at in the next line
            row[...] = flat(spec, spec.flatten(own.tensors))
        if own.broken or not np.isfinite(row).all():
            faults[member.path.name] = listed(own.broken or ["numbers too large for float32"], 1)
        read.append(replace(own, tensors={}))
    if faults:
        named = listed(f"{name} ({why})" for name, why in faults.items())
        raise InputError(f"{folder}: {len(faults)} of {len(members)} members have NaN or infinity: {named}; take them out of the folder")
    notes = [f"left alone: {len(left)} without weights ({listed(left)})"] if left else []
    notes += agree(members, read) + _twins(names, rows)
    if tasks and len(tasks) < len(names):
        notes.append(f"tasks.json does not name {listed(name for name in names if name not in tasks)}: tasks of their own names")
    scores = np.array([quality.get(name, np.nan) for name in names], np.float32)
    words_of = [tasks.get(member.path.name, member.path.stem if member.path.is_file() else member.path.name) for member in members]
    words = tuple(dict.fromkeys(words_of))
    about = {"members": names, "left alone": left, "notes": notes, "adapters": adapter_record(members, read, first.tensors)}
    return Zoo(rows, scores, np.array([[words.index(task)] for task in words_of], np.int32), None, spec, about=about), words


def _by_name(folder: Path, name: str, members: Sequence[str], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What `quality.json` or `tasks.json` says of the members. Raises InputError for values of another kind and for names of no member."""
    kind: Any = {"quality": (int, float), "tasks": str}[name]
    said = {"quality": "a number", "tasks": "words"}[name]
    file = folder / f"{name}.json"
    values: Any = given or (read_json(file) if file.is_file() else {})
    if not isinstance(values, Mapping) or not all(isinstance(value, kind) and value != "" for value in values.values()):
        raise InputError(f"{file} must give {said} for each file: {{file name: {said}}}")
    if unknown := [key for key in values if key not in members]:
        raise InputError(f"{file} names {listed(unknown)}, not in the folder{nearest(unknown[0], members)}; the keys are names of files")
    return values


def _cut(member: Member, read: Read, chunk: int | None, select: str) -> TokenSpec:
    try:
        spec = chunks(read.tensors, chunk, select=select)
        chosen = {piece.path for piece in spec.pieces}
        for pair in pairs(read.tensors).values() if read.layout else ():
            if len({pair.down, pair.up} & chosen) == 1:
                raise InputError(f"select takes one half of the adapter of {pair.module}: both belong together, or none")
    except InputError as error:
        raise InputError(f"{member.path}: {error}") from error
    if empty := [piece.path for piece in spec.pieces if not piece.size]:
        raise InputError(f"{member.path}: {listed(empty)} has no numbers; gather the weights (ZeRO-3) and save, or leave it out by select")
    return spec


def same_tensors(spec: TokenSpec, tensors: Mapping[str, np.ndarray], select: str, path: Path, first: Path) -> None:
    """Raises InputError where a member has other tensors than the first one: missing, more, or of other shapes."""
    own = {name: tuple(leaf.shape) for name, leaf in selected(tensors, select)} if tensors else {}
    ours = {piece.path: piece.shape for piece in spec.pieces}
    faults = {
        "it lacks": [name for name in ours if name not in own],
        "only it has": [name for name in own if name not in ours],
        "of another shape is": [f"{name} {own[name]}, there {ours[name]}" for name in ours if name in own and own[name] != ours[name]],
    }
    said = "; ".join(f"{what} {listed(names, 2)}" for what, names in faults.items() if names)
    if said:
        raise InputError(f"{path} is of another architecture than {first} ({said}); keep one architecture in a zoo")


def _twins(names: Sequence[str], rows: np.ndarray) -> list[str]:
    """A note for members that are the same to the bit, and for all-zero ones."""
    seen: dict[bytes, str] = {}
    same = []
    for name, row in zip(names, rows, strict=True):
        other = seen.setdefault(blake2b(row.tobytes()).digest(), name)
        if other != name:
            same.append(f"{other} = {name}")
    zero = [name for name, row in zip(names, rows, strict=True) if not row.any()]
    return ([f"the same weights twice: {listed(same)}"] if same else []) + ([f"all zero: {listed(zero)}"] if zero else [])


def by_chunk(zoo: Zoo) -> Zoo:
    """Each chunk a member of its own, known by its number."""
    rows = zoo.tokens(slice(None)).reshape(-1, zoo.spec.length)
    numbers = np.tile(np.arange(zoo.spec.rows, dtype=np.int32), len(zoo))[:, None]
    return Zoo(rows, np.repeat(zoo.quality, zoo.spec.rows), numbers, None, one_chunk(zoo.spec), zoo.spec, zoo.about)


def head_tokens(cfg: NetConfig) -> TokenSpec:
    """A head, an mlp or a cnn neuron by neuron."""
    return neurons(net(cfg).spec)
