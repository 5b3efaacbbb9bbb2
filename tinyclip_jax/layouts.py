"""Layouts of foreign CLIP checkpoints: Hugging Face, open_clip, and the original TinyCLIP files."""

from heirloom.common.surgery.layout import Layout
from tinyclip_jax.resnet import STAGES

Rows = tuple[tuple[str, ...], ...]

_CONV = "embed channel patch_row patch_col"
_POSITION = "1 embed + (grid_row grid_col) embed"


def _hf_blocks(ours: str, theirs: str) -> Rows:
    """The encoder of one tower in Hugging Face's names."""
    modules = {
        "attn_norm": "layer_norm1",
        "attn/query": "self_attn.q_proj",
        "attn/key": "self_attn.k_proj",
        "attn/value": "self_attn.v_proj",
        "attn/out": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
    }
    blocks = f"{theirs}.encoder.layers.{{layer}}"
    return tuple(row for a, b in modules.items() for row in _module(f"{ours}/blocks/{a}", f"{blocks}.{b}"))


def _open_clip_blocks(ours: str, theirs: str) -> Rows:
    """The encoder of one tower in open_clip's names; q, k and v are packed, rows in this order."""
    blocks, theirs = f"{ours}/blocks", f"{theirs}resblocks.{{layer}}"
    packed = [" + ".join(f"{blocks}/attn/{p}/{leaf}" for p in ("query", "key", "value")) for leaf in ("kernel", "bias")]
    return (
        *_module(f"{blocks}/attn_norm", f"{theirs}.ln_1"),
        (packed[0], f"{theirs}.attn.in_proj_weight"),
        (packed[1], f"{theirs}.attn.in_proj_bias"),
        *_module(f"{blocks}/attn/out", f"{theirs}.attn.out_proj"),
        *_module(f"{blocks}/mlp_norm", f"{theirs}.ln_2"),
        *_module(f"{blocks}/mlp/up", f"{theirs}.mlp.c_fc"),
        *_module(f"{blocks}/mlp/down", f"{theirs}.mlp.c_proj"),
    )


def _module(ours: str, theirs: str) -> Rows:
    """Weight and bias of a linear layer or a norm."""
    weight = "scale" if ours.endswith("norm") else "kernel"
    return ((f"{ours}/{weight}", f"{theirs}.weight"), (f"{ours}/bias", f"{theirs}.bias"))


def _resnet(theirs: str) -> Rows:
    """CLIP's ResNet in open_clip's names; convolutions are stored as [out, in, row, col]."""
    rows: list[tuple[str, ...]] = []

    def pair(where: str, conv: str, norm: str, their_conv: str, their_norm: str) -> None:
        ours, foreign = f"image/{where}", f"{theirs}{where.replace('/', '.')}"
        rows.append((f"{ours}{conv}/kernel", f"{foreign}{their_conv}.weight", "out in row col"))
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
        rows.extend((f"{ours}{norm}/{leaf}", f"{foreign}{their_norm}.{name}") for leaf, name in names.items())

    for where in ("", *(f"layer{stage}/*/" for stage in STAGES)):
        for i in (1, 2, 3):
            pair(where, f"conv{i}", f"bn{i}", f"conv{i}", f"bn{i}")
        if where:
            pair(where, "down", "down_bn", "downsample.0", "downsample.1")
    pool, foreign = "image/pool", f"{theirs}attnpool"
    rows.append((f"{pool}/cls_position + {pool}/position", f"{foreign}.positional_embedding", _POSITION))
    for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "c_proj")):
        rows.extend(_module(f"{pool}/{ours}", f"{foreign}.{name}"))
    return tuple(rows)


def _open_clip(name: str, image: str, text: str, scale: str, ignore: tuple[str, ...]) -> Layout:
    return Layout(
        name,
        (
            *_resnet(image),
            ("image/patch/project/kernel", f"{image}conv1.weight", _CONV),
            ("image/cls", f"{image}class_embedding"),
            ("image/cls_position + image/position", f"{image}positional_embedding", _POSITION),
            *_module("image/pre_norm", f"{image}ln_pre"),
            *_open_clip_blocks("image", f"{image}transformer."),
            *_module("image/post_norm", f"{image}ln_post"),
            ("image/projection/kernel", f"{image}proj", "embed joint"),
            ("text/token/table", f"{text}token_embedding.weight", "vocab embed"),
            ("text/position", f"{text}positional_embedding", "position embed"),
            *_open_clip_blocks("text", f"{text}transformer."),
            *_module("text/post_norm", f"{text}ln_final"),
            ("text/projection/kernel", f"{text}text_projection", "embed joint"),
            ("logit_scale", scale),
        ),
        ignore,
    )


HF = Layout(
    "hf",
    (
        ("image/patch/project/kernel", "vision_model.embeddings.patch_embedding.weight", _CONV),
        ("image/cls", "vision_model.embeddings.class_embedding"),
        ("image/cls_position + image/position", "vision_model.embeddings.position_embedding.weight", _POSITION),
        *_module("image/pre_norm", "vision_model.pre_layrnorm"),
        *_hf_blocks("image", "vision_model"),
        *_module("image/post_norm", "vision_model.post_layernorm"),
        ("image/projection/kernel", "visual_projection.weight"),
        ("text/token/table", "text_model.embeddings.token_embedding.weight", "vocab embed"),
        ("text/position", "text_model.embeddings.position_embedding.weight", "position embed"),
        *_hf_blocks("text", "text_model"),
        *_module("text/post_norm", "text_model.final_layer_norm"),
        ("text/projection/kernel", "text_projection.weight"),
        ("logit_scale", "logit_scale"),
    ),
    # Buffers that older releases of transformers saved.
    ignore=("*_model.embeddings.position_ids",),
)

# Batch norm's counters; the mask and the three integers are buffers of OpenAI's archives and of older releases.
_BUFFERS = ("**num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size", "**l0_module**")
OPEN_CLIP = _open_clip("open_clip", "visual.", "", "logit_scale", _BUFFERS)

# A training checkpoint holds the parameters of the learned masks next to the weights.
_TRAINED = ("**l0_module**", "**num_batches_tracked", "_text_encoder.attn_mask")
ORIGINAL = _open_clip("original", "_image_encoder.visual.", "_text_encoder.", "_logit_scale.logit_scale", _TRAINED)
