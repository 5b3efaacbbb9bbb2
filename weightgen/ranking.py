"""Ranking the matrices of a language model by their signal-to-noise ratio, tensor by tensor from disk."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.unwrap import weights_files
from heirloom.common.checkpoint.weights import is_folder, open_folder
from heirloom.common.errors import InputError, remark
from heirloom.common.files import staged
from weightgen.zoo.foreign import listed, not_finite, read_tensors, refuse_quantised
from weightgen.zoo.lora import has_adapters

IQR = 1.349  # interquartile range of a standard normal
EMBEDDING = re.compile(
    r"(embed(ding)?s?|embd|embeds_layer)$|^embed_((text_|audio_)?tokens|in|positions)(_per_layer)?$"
    r"|^(wte|wpe|shared|table|emb|relative_attention_bias)$"
)
EMBEDDINGS = "embeddings"
EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
BARE = re.compile(r"(\w+|decoder\.layers)\.\d+\.")  # saved without the head, which puts a prefix before the layers
ONE_EXPERT = re.compile(r"\.experts\.\d+\.")  # a file with each expert in a tensor of its own
# What transformers renames on loading, and regular expressions for either name, applied one after another.
RENAMED = (
    (r"\.block_sparse_moe\.(gate|router\.layer)\.", ".(block_sparse_moe|mlp).(gate|router|router.layer)."),
    (r"\.block_sparse_moe\.", ".(block_sparse_moe|mlp)."),
    (r"_tower\.vision_model\.", "_tower.(vision_model.)?"),
)
# The same in a model of pictures or sound, which has its language model as a part; `model.` alone is Qwen2-VL's.
RENAMED_PARTS = (
    (r"^(\w+_model)\.model\.", r"(\1.model|model.\1)."),
    (r"^model\.(?!language_model\.|visual\.)", "model.(language_model.)?"),
    (r"^(\w+_model\.)lm_head\.", r"(\1)?lm_head."),
    (r"^(?!model\.|lm_head\.|\()", "(model.)?"),
)
WEIGHT = re.compile(r"(^|_)(weight|kernel)$|^w$")  # last part of a name: also in_proj_weight of torch, and w of Haiku
# May hold -inf, and no weights. A causal mask with the name of a bias has 4 axes, and its value for masked places none.
BUFFER = re.compile(r"mask$|(?P<bias>(attn|attention)\.(masked_)?bias)$|inv_freq$|(cos|sin)_cached$|position_ids$")


def snr(matrix: np.ndarray) -> float:
    """Spectrum's signal-to-noise ratio of a weight matrix [n, m] (arXiv 2406.06623).

    Singular values above eps = sigma (1 + sqrt(beta)), summed, over those below, over the largest; sigma is the
    interquartile range of the singular values / 1.349 and beta the aspect ratio. A ranking, not a test: of pure noise
    23 % still lie above.
    """
    dtype = np.float64 if np.dtype(matrix.dtype) == np.float64 else np.float32
    values = np.linalg.svd(np.asarray(matrix, dtype), compute_uv=False).astype(np.float64)
    if values[0] == 0:
        return 0.0
    low, high = np.quantile(values, (0.25, 0.75))
    n, m = matrix.shape
    eps = (high - low) / IQR * (1 + sqrt(min(n, m) / max(n, m)))
    noise = values[values <= eps].sum()
    return float(values[values > eps].sum() / (noise if noise > 0 else 1.0) / values[0])


@dataclass(frozen=True)
class Ranked:
    """A tensor (or one layer or expert of a stacked one), its kind and its ratio."""

    name: str
    kind: str
    snr: float


def rank(tensors: Mapping[str, np.ndarray], *, least: int = 16) -> list[Ranked]:
    """Rank all matrices by falling ratio, equal ratios by name. Tensors may be memory maps: one is in memory at a time.

    kind: the name without its layer number, as Spectrum keeps a share of each kind. Fused experts [expert, in, out] are
    ranked one by one, as "name@expert". Packed projections (gpt2's c_attn, phi's qkv_proj, a gate_up_proj) are ranked
    as the one matrix they are stored as; a transposed one, as gpt2's Conv1D keeps it, has the same singular values.
    Embeddings, a head that is equal to one (a tied one is no parameter), vectors (norms and biases), buffers,
    parameters of no layer (a Mamba's A_log) and matrices with a side below `least` are left out, and a warning says
    which. Raises InputError for quantised weights, for adapters, for NaN or infinity anywhere but in a mask, and when
    no matrix is left.
    """
    refuse_quantised(tensors)
    if adapter := next((name for name in tensors if has_adapters({name: tensors[name]})), None):
        raise InputError(f"{adapter} is of an adapter: merge it into its base model and rank that")
    if broken := not_finite({name: tensor for name, tensor in tensors.items() if not _is_buffer(name, tensor)}):
        which = f"{len(broken)} of {len(tensors)} tensors ({listed(broken)})"
        raise InputError(f"NaN or infinity in {which}: take another checkpoint")
    matrices: dict[str, np.ndarray] = {}
    left: dict[str, list[str]] = {}
    reasons = {name: _left_out(name, tensor, least) for name, tensor in tensors.items()}
    embeddings = [tensors[name] for name, why in reasons.items() if why == EMBEDDINGS]
    for name, tensor in tensors.items():
        tied = tensor.ndim == 2 and any(np.array_equal(tensor, embedding) for embedding in embeddings)
        if why := EMBEDDINGS if tied else reasons[name]:
            left.setdefault(why, []).append(name)
        elif tensor.ndim == 3:
            matrices |= {f"{name}@{i}": expert for i, expert in enumerate(tensor)}
        else:
            matrices[name] = tensor
    if not matrices:
        out = "embeddings, vectors and small matrices are left out"
        raise InputError(f"no matrix to rank among {listed(tensors) or 'no tensors'}: {out}")
    if left:
        said = "; ".join(f"{why}: {listed(names, 2)}" for why, names in left.items())
        remark(f"left out of the ranking: {said}")
    found = [Ranked(name, _kind(name), snr(matrix)) for name, matrix in matrices.items()]
    return sorted(found, key=lambda r: (-r.snr, r.name))


def _kind(name: str) -> str:
    return ".".join(part for part in re.split(r"[/.@]", name) if not part.isdigit())


def _is_buffer(name: str, tensor: np.ndarray) -> bool:
    hit = BUFFER.search(name)
    return hit is not None and (not hit["bias"] or tensor.ndim in (0, 4))


def _left_out(name: str, tensor: np.ndarray, least: int) -> str:
    """Give the reason why a tensor is not ranked, or an empty string."""
    parts = [part for part in re.split(r"[/.@]", name) if not part.isdigit()] or [name]
    weight = WEIGHT.search(parts[-1])
    if parts[-1] in ("weight", "kernel") and len(parts) > 1:
        parts = parts[:-1]
    if np.dtype(tensor.dtype).kind in "iubc" or _is_buffer(name, tensor):
        return "buffers"
    if EMBEDDING.search(parts[-1]) or name == "transformer.w.weight":  # the latter is CTRL's
        return EMBEDDINGS
    if tensor.ndim < 2 or parts[-1].endswith("bias"):
        return "norms, biases and other vectors"
    stacked = tensor.ndim == 3 and EXPERTS.search(name)
    if tensor.ndim > 2 and not stacked:
        return f"tensors of {tensor.ndim} axes"
    if not (weight or stacked):
        return "parameters that are no weight of a layer"
    return f"matrices with a side below {least}" if min(tensor.shape[-2:]) < least else ""


def rank_checkpoint(source: str, **how: Any) -> list[Ranked]:
    """Rank the tensors of a checkpoint by SOURCE: a folder, a file, hf:org/name; shards are opened lazily.

    A weights folder of heirloom is ranked layer by layer, as "path@layer". Raises InputError as `rank` does, and for
    missing shards.
    """
    path = Path(locate(source))
    if is_folder(path):
        return rank(unstacked(open_folder(path).tensors), **how)
    tensors = read_tensors(weights_files(path))
    refuse_quantised(tensors, (path if path.is_dir() else path.parent) / "config.json")
    return rank(tensors, **how)


def check_share(share: float) -> None:
    """Raise InputError for what is no share of the matrices."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share}: choose a number above 0, up to 1")


def top(ranked: Sequence[Ranked], share: float = 0.25) -> list[Ranked]:
    """Pick the best `share` of each kind, at least one, in the order of their ratio."""
    kinds: dict[str, list[Ranked]] = {}
    for entry in ranked:
        kinds.setdefault(entry.kind, []).append(entry)
    kept = {entry.name for members in kinds.values() for entry in members[: max(round(share * len(members)), 1)]}
    return [entry for entry in ranked if entry.name in kept]


def unstacked(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """List the matrices of a model of ours with layers stacked: "path@layer" -> [in, out], heads merged."""
    out = {}
    for path, leaf in params.items():
        if "blocks/" in path and path.endswith("kernel") and np.ndim(leaf) >= 3:
            array = np.asarray(leaf)
            for i in range(len(array)):
                out[f"{path}@{i}"] = layer_matrix(path, array[i])
    return out


def layer_matrix(path: str, kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel of one layer as a matrix [in, out], heads merged."""
    # q, k, v map embed to heads; the output projection maps heads to embed.
    lead = prod(kernel.shape[:-1]) if path.endswith("out/kernel") else kernel.shape[0]
    return kernel.reshape(lead, -1)


def command(args: Namespace) -> dict[str, Any]:
    """Run `heirloom rank`: print the best share of each kind, and write it as a list of parameters to train."""
    check_share(args.share)
    ranked = rank_checkpoint(args.what)
    best = top(ranked, args.share)
    if args.unfreeze:
        stacked = next((one.name for one in best if "@" in one.name), None)
        if stacked:
            raise InputError(f"--unfreeze: {stacked} is a part of a tensor and cannot be trained alone")
        if expert := next((one.name for one in best if ONE_EXPERT.search(one.name)), None):
            joined = "transformers 5 joins the experts of a layer when it loads them, so no pattern will match these"
            remark(f"--unfreeze: {expert} is one expert: {joined}")
        if bare := next((one.name for one in best if BARE.match(one.name)), None):
            prefix = "a model with a head adds a prefix, such as transformer. or model.: put it before each line"
            remark(f"--unfreeze: {bare} is a name of a model without its head; {prefix}, or no pattern matches")
        with staged(args.unfreeze, force=args.force) as file:
            file.write_text(unfrozen(best), encoding="utf-8")
    width = max(len(one.name) for one in best)
    for one in best:
        print(f"{one.name:<{width}}  {one.snr:.3g}")
    kinds = len({one.kind for one in ranked})
    print(f"{args.what}: {len(best)} of {len(ranked)} matrices of {kinds} kinds, by falling signal-to-noise ratio")
    return {"share": args.share, "ranked": [asdict(one) for one in ranked], "best": [one.name for one in best]}


def unfrozen(best: Sequence[Ranked]) -> str:
    """Return a list of patterns in YAML, in Spectrum's form. Dots are not escaped: axolotl does that itself.

    A pattern matches the name in the file and the one that transformers gives on loading (its `conversion_mapping`).
    """
    parts = any(re.match(r"(language_model|text_model\.model|visual)\.", one.name) for one in best)
    names = [one.name for one in best]
    for pattern, either in RENAMED + (RENAMED_PARTS if parts else ()):
        names = [re.sub(pattern, either, name) for name in names]
    return "unfrozen_parameters:\n" + "".join(f"- ^{name}$\n" for name in names)
