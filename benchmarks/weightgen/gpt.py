"""A GPT-2-shaped language model, small enough to train here, and a score for it: choosing the right word.

The text is Python's own language reference as it comes with every CPython (`pydoc_data.topics`): real English, and no
download. Tasks to adapt it to are the modules of the standard library.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from heirloom.common.nn import precision
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.block import Block, scan, stack
from heirloom.common.nn.dense import normal, param, zeros
from heirloom.common.nn.functional import Functional
from heirloom.common.nn.norm import LayerNorm

INIT = normal(0.02)
Params = dict[str, Any]


@dataclass(frozen=True)
class GptConfig:
    vocab: int = 2048
    context: int = 64
    width: int = 128
    layers: int = 4
    heads: int = 4

    @property
    def hidden(self) -> int:
        return 4 * self.width


class Gpt(nnx.Module):
    """Pre-norm decoder with learned positions; embedding and output share a table. tokens: [batch, time] int32.

    Returns logits [batch, time, vocab].
    """

    def __init__(self, cfg: GptConfig, *, rngs: nnx.Rngs):
        sizes = dict(
            embed=cfg.width,
            head=cfg.heads,
            head_dim=cfg.width // cfg.heads,
            hidden=cfg.hidden,
            vocab=cfg.vocab,
            time=cfg.context,
        )
        attention: Any = partial(Attention, sizes, attend=softmax(causal=True), qkv=INIT, out=INIT)
        block: dict[str, Any] = dict(activation="gelu_tanh", eps=1e-5, up=INIT, down=INIT, bias=zeros)
        self.table = param("vocab -> embed", sizes, INIT, rngs)
        self.position = param("time -> embed", sizes, INIT, rngs)
        self.blocks = stack(lambda rngs: Block(sizes, attention=attention, **block, rngs=rngs), cfg.layers, rngs)
        self.norm = LayerNorm(sizes, eps=1e-5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return precision.product("bte,ve->btv", self.hidden(tokens), self.table[...])

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """[batch, time, width], what the output table reads; its mean over time describes a text."""
        x = precision.lookup(self.table[...], tokens) + self.position[...][: tokens.shape[1]]
        return self.norm(scan(self.blocks, x))


@dataclass(frozen=True)
class Text:
    """Token ids of a text cut in three by position. vocab: entries of the tokenizer."""

    train: np.ndarray
    select: np.ndarray
    test: np.ndarray
    vocab: int


@cache
def reference_text(vocab: int = 2048) -> Text:
    """The language reference in byte-pair tokens fitted to its first 80 %; the last tenths select and test."""
    tokenizer, parts = _reference(vocab)
    train, select, test = (np.array(tokenizer.encode(part).ids, np.int32) for part in parts)
    return Text(train=train, select=select, test=test, vocab=tokenizer.get_vocab_size())


def module_texts(vocab: int = 2048, least: int = 4000) -> dict[str, Text]:
    """Modules of the standard library of at least `least` tokens, one text each: half to train, then quarters."""
    tokenizer, _ = _reference(vocab)
    found = {}
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        ids = np.array(tokenizer.encode(file.read_text(encoding="utf-8")).ids, np.int32)
        if len(ids) >= least:
            train, select, test = np.split(ids, [len(ids) // 2, 3 * len(ids) // 4])
            found[file.stem] = Text(train=train, select=select, test=test, vocab=vocab)
    return found


@cache
def _reference(vocab: int) -> tuple[Any, list[str]]:
    """The tokenizer, and the reference in three parts."""
    from pydoc_data import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    # Topics in a fixed order, and each whole in one part: no sentence is on two sides.
    names = sorted(topics.topics)
    order = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    cuts = [0, int(0.8 * len(order)), int(0.9 * len(order)), len(order)]
    parts = ["\n".join(topics.topics[name] for name in order[a:b]) for a, b in pairwise(cuts)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([parts[0]], trainer)
    return tokenizer, parts


def train(
    model: Functional, cfg: GptConfig, text: np.ndarray, steps: int, *, batch: int = 32, lr: float = 2e-3, seed: int = 0
) -> Params:
    """AdamW with warm-up and cosine on random windows of the text; next-token cross-entropy."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, lr, max(steps // 20, 1), steps), weight_decay=0.01)
    params = model.init(jax.random.key(seed))

    @jax.jit
    def step(params: Params, state: Any, tokens: jax.Array) -> Any:
        grads = jax.grad(partial(next_token_loss, model))(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        params, state = step(params, state, windows_of(text, cfg.context + 1, (batch,), rng=rng))
    return params


ADAPTED = ("query", "value")  # the projections that low-rank adapters change


def fresh_adapter(cfg: GptConfig, rank: int, key: jax.Array) -> Params:
    """Pairs under the names of peft: A [rank, in] random, B [out, rank] zero, so that nothing changes at first."""
    out = {}
    for i, (layer, part) in enumerate(product(range(cfg.layers), ADAPTED)):
        name = f"blocks.{layer}.attn.{part}"
        out[f"{name}.lora_A.weight"] = jax.random.normal(jax.random.fold_in(key, i), (rank, cfg.width)) / cfg.width**0.5
        out[f"{name}.lora_B.weight"] = jnp.zeros((cfg.width, rank))
    return out


def adapted(params: Params, adapter: Params) -> Params:
    """The model with B A added to each adapted projection."""
    out = dict(params)
    for part in ADAPTED:
        path = f"blocks/attn/{part}/kernel"
        names = [f"blocks.{layer}.attn.{part}" for layer in range(len(params[path]))]
        added = jnp.stack([(adapter[f"{n}.lora_B.weight"] @ adapter[f"{n}.lora_A.weight"]).T for n in names])
        out[path] = params[path] + added.reshape(params[path].shape)
    return out


def train_adapters(
    model: Functional, cfg: GptConfig, params: Params, windows: np.ndarray, begin: Params, lr: float = 5e-3
) -> Params:
    """An adapter for each task, from the same start: Adam with cosine, one batch of windows a step. Leaves [task, ...].

    windows: [task, step, batch, time + 1] token ids.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, windows.shape[1]))

    def loss(adapter: Params, tokens: jax.Array) -> jax.Array:
        return next_token_loss(model, adapted(params, adapter), tokens)

    def one(task: jax.Array) -> Params:
        def step(carry: Any, tokens: jax.Array) -> tuple[Any, None]:
            adapter, state = carry
            updates, state = optimizer.update(jax.grad(loss)(adapter, tokens), state)
            return (optax.apply_updates(adapter, updates), state), None

        return jax.lax.scan(step, (begin, optimizer.init(begin)), task)[0][0]

    return jax.jit(lambda windows: jax.lax.map(one, windows))(windows)


def next_token_loss(model: Functional, params: Params, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token (nats). tokens: [batch, time + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean()


def windows_of(text: np.ndarray, time: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random windows of a text, [*shape, time]."""
    return text[rng.integers(len(text) - time, size=shape)[..., None] + np.arange(time)]


@dataclass(frozen=True)
class Choices:
    """Questions with one right answer.

    tokens: [question, option, time], options equal but for their last token; answer: [question].
    """

    tokens: np.ndarray
    answer: np.ndarray


def word_choice(text: np.ndarray, cfg: GptConfig, questions: int, options: int = 8, seed: int = 0) -> Choices:
    """After a context of half the model's, which token follows? Wrong options are drawn from the same text."""
    rng = np.random.default_rng(seed)
    length = cfg.context // 2
    starts = rng.choice(len(text) - length - 1, questions, replace=len(text) - length - 1 < questions)
    context = text[starts[:, None] + np.arange(length)]
    right = text[starts + length]
    wrong = text[rng.integers(len(text), size=(questions, options - 1))]
    while (same := wrong == right[:, None]).any():
        wrong[same] = text[rng.integers(len(text), size=int(same.sum()))]
    answer = rng.integers(options, size=questions)
    last = np.insert(wrong, 0, right, axis=1)
    rows = np.arange(questions)
    last[rows, 0], last[rows, answer] = last[rows, answer], right
    whole = np.concatenate([np.broadcast_to(context[:, None], (questions, options, length)), last[..., None]], axis=2)
    return Choices(whole.astype(np.int32), answer)


def last_logits(model: Functional) -> Callable[[Params, np.ndarray], Any]:
    """Logits behind each context, compiled once for all questions of a shape."""
    return jax.jit(lambda params, tokens: model.apply(params, tokens)[:, -1])


def scorer(last: Callable[[Params, np.ndarray], Any], choices: Choices) -> Callable[[Params], float]:
    """`score(params)`: share of questions whose right option the model finds likeliest."""

    def score(params: Params) -> float:
        found = np.take_along_axis(
            np.asarray(last(params, choices.tokens[:, 0, :-1])), choices.tokens[:, :, -1], axis=1
        ).argmax(1)
        return float((found == choices.answer).mean())

    return score
