"""Reads and writes the encoder of transformers' T5 folders (`T5EncoderModel`, or a whole T5 with its decoder)."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.family import Donor, Family, Format, Found, Guess, Lookalike, Read
from heirloom.common.checkpoint.fields import TRANSFORMERS, Fields
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError, remark
from heirloom.common.files import write_json
from heirloom.common.surgery.layout import Layout, release
from heirloom.common.typed import from_json
from lit_jax.text.t5 import T5Config, T5Encoder, macs, parameters
from lit_jax.text.tokenizer import FILES as TOKENIZER_FILES
from lit_jax.text.tokenizer import find_tokenizer
from lit_jax.text.verify import features, verify

FILE = "model.safetensors"
TABLE, COPY = "shared.weight", "encoder.embed_tokens.weight"  # two names of the table of tokens
FIRST = "encoder.block.0.layer.0.SelfAttention"
POSITIONS = f"{FIRST}.relative_attention_bias.weight"
GATE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
_QUANTISED = (".absmax", ".quant_map", ".SCB")  # of bitsandbytes, in 4 and 8 bits
_ATTENTION = "encoder.block.{layer}.layer.0"
_MLP = "encoder.block.{layer}.layer.1"

HF = Layout(
    name="hf",
    rows=(
        ("embed/table", TABLE, "vocab embed"),
        ("position/table", POSITIONS, "bucket head"),
        ("blocks/attn_norm/scale", f"{_ATTENTION}.layer_norm.weight"),
        ("blocks/attn/query/kernel", f"{_ATTENTION}.SelfAttention.q.weight", "(head head_dim) embed"),
        ("blocks/attn/key/kernel", f"{_ATTENTION}.SelfAttention.k.weight", "(head head_dim) embed"),
        ("blocks/attn/value/kernel", f"{_ATTENTION}.SelfAttention.v.weight", "(head head_dim) embed"),
        ("blocks/attn/out/kernel", f"{_ATTENTION}.SelfAttention.o.weight", "embed (head head_dim)"),
        ("blocks/mlp_norm/scale", f"{_MLP}.layer_norm.weight"),
        ("blocks/mlp/gate/kernel", f"{_MLP}.DenseReluDense.wi_0.weight"),
        ("blocks/mlp/up/kernel", f"{_MLP}.DenseReluDense.wi_1.weight"),
        ("blocks/mlp/down/kernel", f"{_MLP}.DenseReluDense.wo.weight"),
        ("norm/scale", "encoder.final_layer_norm.weight"),
    ),
)


def _read(found: Found) -> Read | None:
    tensors = found.tensors
    if not {f"{FIRST}.q.weight", GATE} <= tensors.keys() or not {TABLE, COPY} & tensors.keys():
        return None
    fields = found.json("config.json")
    needed = "take the checkpoint that was quantised, in bfloat16 or float32"
    if fields is not None and fields.value("quantization_config") is not None:
        raise fields.refusal("quantization_config", needed)
    if any(key.endswith(_QUANTISED) for key in tensors):
        raise InputError(f"a quantised T5: {needed}")
    if f"{FIRST.replace('.0.', '.1.', 1)}.relative_attention_bias.weight" in tensors:
        raise InputError("a umT5, with a table of positions in every layer; only T5 v1.1, mT5 and ByT5 can be read")
    if POSITIONS not in tensors:
        raise InputError(f"tensor {POSITIONS!r} is missing: a T5 encoder has one; fetch the file again")
    sizes = _sizes(tensors)
    if fields is None or "model_type" not in fields:  # a bare file, or the config of another part of a pipeline
        why = "the file contains no config, and every published T5 has this value"
        guesses = (Guess("max_distance", T5Config.max_distance, why), Guess("eps", T5Config.eps, why))
        return Read(T5Config(**sizes), guesses)
    return Read(_read_config(fields, sizes))


def _sizes(tensors: Tensors) -> dict[str, int]:
    """Returns the sizes that the shapes of the tensors contain."""
    vocabulary, width = _matrix(tensors, TABLE if TABLE in tensors else COPY)
    buckets, heads = _matrix(tensors, POSITIONS)
    inner, hidden = _matrix(tensors, f"{FIRST}.q.weight")[0], _matrix(tensors, GATE)[0]
    if not heads or inner % heads:
        raise InputError(f"{heads} heads in {POSITIONS!r} do not divide the queries' {inner} rows; fetch it again")
    layers = 1 + max(int(m[1]) for key in tensors if (m := re.match(r"encoder\.block\.(\d{1,6})\.", key)))
    sizes = dict(vocabulary=vocabulary, width=width, layers=layers, heads=heads, head_dim=inner // heads)
    return sizes | dict(hidden=hidden, buckets=buckets)


def _matrix(tensors: Tensors, key: str) -> tuple[int, int]:
    if tensors[key].ndim != 2:
        raise InputError(f"tensor {key!r} has shape {tensors[key].shape}, and must be a matrix; fetch the file again")
    rows, columns = tensors[key].shape
    return rows, columns


def _read_config(fields: Fields, sizes: dict[str, int]) -> T5Config:
    fields.fixed("model_type", "t5", "mt5", feature="umT5 has a table of positions in every layer")
    fields.fixed(
        "feed_forward_proj", "gated-gelu", feature="the first T5, of 2019, has no gate; T5 v1.1 and Flan-T5 have one"
    )
    if "feed_forward_proj" not in fields:
        first = "this is the first T5, without a gate; use T5 v1.1 or Flan-T5"
        raise InputError(f"{fields.where}: 'feed_forward_proj' is missing, so {first}")
    fields.fixed("dense_act_fn", "gelu_new", "gelu_pytorch_tanh")
    fields.fixed("is_gated_act", True)
    names = dict(vocab_size="vocabulary", d_model="width", num_layers="layers", num_heads="heads", d_kv="head_dim")
    names |= dict(d_ff="hidden", relative_attention_num_buckets="buckets")
    usual = dict(vocab_size=32128, d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=2048)
    for name, ours in names.items():
        fields.agree(name, fields.integer(name, usual.get(name, 32)), sizes[ours])
    cfg = T5Config(
        **sizes,
        max_distance=fields.integer("relative_attention_max_distance", 128),
        eps=fields.number("layer_norm_epsilon", 1e-6),
    )
    fields.fixed("is_decoder", False)
    fields.fixed("pruned_heads", {}, None)
    fields.skip("is_encoder_decoder", "num_decoder_layers", "add_cross_attention", "n_positions", "output_past")
    fields.skip("classifier_dropout", "scale_decoder_outputs", *TRANSFORMERS)
    fields.done()
    return cfg


def write_config(cfg: T5Config, folder: Path) -> None:
    sizes = dict(vocab_size=cfg.vocabulary, d_model=cfg.width, d_kv=cfg.head_dim, d_ff=cfg.hidden)
    sizes |= dict(num_layers=cfg.layers, num_decoder_layers=cfg.layers, num_heads=cfg.heads)
    positions = dict(relative_attention_num_buckets=cfg.buckets, relative_attention_max_distance=cfg.max_distance)
    rest: dict[str, Any] = dict(feed_forward_proj="gated-gelu", layer_norm_epsilon=cfg.eps, dropout_rate=0.1)
    rest |= dict(is_encoder_decoder=True, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1)
    about = dict(architectures=["T5EncoderModel"], model_type="t5")
    write_json(folder / "config.json", about | sizes | positions | rest)


def encoder_alone(cfg: T5Config, tensors: Tensors) -> Tensors:
    """Returns the tensors of the encoder: without a decoder, and with the table of tokens under one name.

    Raises InputError where its two names hold different tables.
    """
    decoder = [key for key in tensors if key.startswith(("decoder.", "lm_head."))]
    if decoder:
        remark(f"a whole T5: its decoder ({len(decoder)} tensors) is not part of the text encoder and is left out")
    kept = {key: value for key, value in tensors.items() if key not in (*decoder, COPY)}
    if COPY in tensors and not _equal(tensors[COPY], kept.setdefault(TABLE, tensors[COPY])):
        raise InputError(f"{TABLE!r} and {COPY!r} differ, and a T5 has one table of tokens; fetch the checkpoint again")
    return kept


def _equal(a: np.ndarray, b: np.ndarray, rows: int = 4096) -> bool:
    """Compares two tables part by part, and gives their memory back: those of a T5-XXL are 0.5 GB."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    equal = all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))
    release(a)
    release(b)
    return equal


def _sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Copies the tokenizer of the text encoder, if there is one. Raises InputError for weights in float16 in `hf`."""
    if format == HF.name and any(leaf.dtype == np.float16 for leaf in donor.source.spec.values()):
        raise InputError(
            f"{donor.path}: is in float16, in which a T5 overflows in other libraries, and is not written for them;"
            " take a file in bfloat16 or float32"
        )
    if (folder := find_tokenizer(donor.folder)) is not None:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, destination / name)


LOOKALIKES = (
    Lookalike(
        "*encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "the first T5, of 2019, whose MLP has no gate: only T5 v1.1 can be read, such as google/t5-v1_1-xxl",
    ),
    Lookalike("*encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "a T5 without its table of tokens"),
    Lookalike("enc.blk.0.attn_q.weight", "a T5 from a GGUF file: take the safetensors file it was made from"),
)
FORMATS = (
    Format(name="hf", layout=HF, file=FILE, read_config=_read, write_config=write_config, complete=encoder_alone),
)
FAMILY = Family(
    name="t5",
    module=T5Encoder,
    config=partial(from_json, T5Config),
    formats=FORMATS,
    sidecars=_sidecars,
    verify=verify,
    parameters=parameters,
    macs=macs,
    lookalikes=LOOKALIKES,
    outputs=features,
)
