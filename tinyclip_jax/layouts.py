"""Layouts of foreign CLIP checkpoints: Hugging Face (torch and Flax), open_clip, and the original TinyCLIP files."""

from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import PATCH, Rows, flax_blocks, module, modules, packed
from heirloom.common.vit.layouts import timm
from tinyclip_jax.model import ClipConfig
from tinyclip_jax.resnet import STAGES
from tinyclip_jax.vit import VitImageConfig

_PACKED = ("in_proj_weight", "in_proj_bias")
_POSITION = "1 embed + (grid_row grid_col) embed"
_HF_MODULES = {
    "attn_norm": "layer_norm1",
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def _hf_blocks(ours: str, theirs: str) -> Rows:
    """The encoder of one tower in Hugging Face's names."""
    return modules(f"{ours}/blocks", f"{theirs}.encoder.layers.{{layer}}", _HF_MODULES)


def _open_clip_blocks(ours: str, theirs: str) -> Rows:
    """The encoder of one tower in open_clip's names; q, k and v are packed, rows in this order."""
    blocks, theirs = f"{ours}/blocks", f"{theirs}resblocks.{{layer}}"
    projections = tuple(f"{blocks}/attn/{name}" for name in ("query", "key", "value"))
    return (
        *module(f"{blocks}/attn_norm", f"{theirs}.ln_1"),
        *packed(projections, f"{theirs}.attn", *_PACKED),
        *module(f"{blocks}/attn/out", f"{theirs}.attn.out_proj"),
        *module(f"{blocks}/mlp_norm", f"{theirs}.ln_2"),
        *module(f"{blocks}/mlp/up", f"{theirs}.mlp.c_fc"),
        *module(f"{blocks}/mlp/down", f"{theirs}.mlp.c_proj"),
        (f"{blocks}/attn_scale/scale", f"{theirs}.ls_1.gamma"),
        (f"{blocks}/mlp_scale/scale", f"{theirs}.ls_2.gamma"),
    )


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
        rows.extend(module(f"{pool}/{ours}", f"{foreign}.{name}"))
    return tuple(rows)


def _image_tower(theirs: str) -> Rows:
    """CLIP's ViT in open_clip's names."""
    return (
        ("image/patch/project/kernel", f"{theirs}conv1.weight", PATCH),
        ("image/cls", f"{theirs}class_embedding"),
        ("image/cls_position + image/position", f"{theirs}positional_embedding", _POSITION),
        *module("image/pre_norm", f"{theirs}ln_pre"),
        *_open_clip_blocks("image", f"{theirs}transformer."),
        *module("image/post_norm", f"{theirs}ln_post"),
        ("image/projection/kernel", f"{theirs}proj", "embed joint"),
    )


def _timm_tower(cfg: VitImageConfig, theirs: str) -> Rows:
    """timm's ViT inside of open_clip; an affine projection is timm's own head."""
    head = "trunk.head" if cfg.projection == "affine" else "head.proj"
    rows = [row for row in timm(cfg).rows if not row[0].startswith(("head", "distillation_head"))]
    paths = (" + ".join(f"image/{path}" for path in row[0].split(" + ")) for row in rows)
    inside = tuple((path, f"{theirs}trunk.{row[1]}", *row[2:]) for path, row in zip(paths, rows, strict=True))
    return (*inside, *module("image/projection", f"{theirs}{head}"))


def _text_tower(theirs: str, affine: bool) -> Rows:
    projection: Rows = (("text/projection/kernel", f"{theirs}text_projection", "embed joint"),)
    return (
        ("text/token/table", f"{theirs}token_embedding.weight", "vocab embed"),
        ("text/position", f"{theirs}positional_embedding", "position embed"),
        *_open_clip_blocks("text", f"{theirs}transformer."),
        *module("text/post_norm", f"{theirs}ln_final"),
        *(module("text/projection", f"{theirs}text_projection") if affine else projection),
    )


# Batch norm's counters; the mask and the three integers are buffers of OpenAI's archives and of older releases.
_BUFFERS = ("**num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size", "**l0_module**")


def open_clip(cfg: ClipConfig) -> Layout:
    """Layout of open_clip's CLIP; its CustomTextCLIP has the same names after "text." is removed."""
    theirs = "visual."
    image = _timm_tower(cfg.image, theirs) if isinstance(cfg.image, VitImageConfig) else _image_tower(theirs)
    text, scalars = _text_tower("", cfg.text.projection == "affine"), (("logit_scale",) * 2, ("logit_bias",) * 2)
    return Layout("open_clip", (*_resnet(theirs), *image, *text, *scalars), _BUFFERS)


OPEN_CLIP = open_clip(ClipConfig())


def _hf_text(projection: Rows) -> Rows:
    return (
        ("text/token/table", "text_model.embeddings.token_embedding.weight", "vocab embed"),
        ("text/position", "text_model.embeddings.position_embedding.weight", "position embed"),
        *_hf_blocks("text", "text_model"),
        *module("text/post_norm", "text_model.final_layer_norm"),
        *projection,
    )


_HF_PATCH = "vision_model.embeddings.patch_embedding"
_HF_POSITION = "vision_model.embeddings.position_embedding.weight"
# Buffers that older releases of transformers saved.
_HF_BUFFERS = ("*_model.embeddings.position_ids",)
HF = Layout(
    "hf",
    (
        ("image/patch/project/kernel", f"{_HF_PATCH}.weight", PATCH),
        ("image/cls", "vision_model.embeddings.class_embedding"),
        ("image/cls_position + image/position", _HF_POSITION, _POSITION),
        *module("image/pre_norm", "vision_model.pre_layrnorm"),
        *_hf_blocks("image", "vision_model"),
        *module("image/post_norm", "vision_model.post_layernorm"),
        ("image/projection/kernel", "visual_projection.weight"),
        *_hf_text((("text/projection/kernel", "text_projection.weight"),)),
        ("logit_scale", "logit_scale"),
    ),
    _HF_BUFFERS,
)

_POOL = ("image/pool/attn/query", "image/pool/memory/key", "image/pool/memory/value")
_POOL_MODULES = {"attn/out": "attention.out_proj", "norm": "layernorm", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
SIGLIP = Layout(
    "hf",
    (
        ("image/patch/project/kernel", f"{_HF_PATCH}.weight", PATCH),
        ("image/patch/project/bias", f"{_HF_PATCH}.bias"),
        ("image/position", _HF_POSITION, "(grid_row grid_col) embed"),
        *_hf_blocks("image", "vision_model"),
        *module("image/norm", "vision_model.post_layernorm"),
        ("image/pool/latent", "vision_model.head.probe", "1 1 embed"),
        *packed(_POOL, "vision_model.head.attention", *_PACKED),
        *modules("image/pool", "vision_model.head", _POOL_MODULES),
        *_hf_text(module("text/projection", "text_model.head")),
        ("logit_scale", "logit_scale", "1"),
        ("logit_bias", "logit_bias", "1"),
    ),
    _HF_BUFFERS,
)


def hf(cfg: ClipConfig) -> Layout:
    """Layout of transformers' SigLIP for timm's ViT as image tower, else of its CLIP."""
    return SIGLIP if isinstance(cfg.image, VitImageConfig) else HF


def _flax_tower(ours: str, theirs: str) -> Rows:
    """The encoder of one tower in the names of transformers' Flax models, and its last norm; kernels read first."""
    last = "post_layernorm" if ours == "image" else "final_layer_norm"
    norms = {"post_norm": last} | ({"pre_norm": "pre_layrnorm"} if ours == "image" else {})
    ends = ((f"{ours}/{a}/{leaf}", f"{theirs}/{b}/{leaf}") for a, b in norms.items() for leaf in ("scale", "bias"))
    return (*flax_blocks(f"{ours}/blocks", f"{theirs}/encoder/layers/{{layer}}", _HF_MODULES), *ends)


FLAX = Layout(
    "flax",
    (
        (
            "image/patch/project/kernel",
            "vision_model/embeddings/patch_embedding/kernel",
            "patch_row patch_col channel embed",
        ),
        ("image/cls", "vision_model/embeddings/class_embedding"),
        ("image/cls_position + image/position", "vision_model/embeddings/position_embedding/embedding", _POSITION),
        *_flax_tower("image", "vision_model"),
        ("image/projection/kernel", "visual_projection/kernel", "embed joint"),
        ("text/token/table", "text_model/embeddings/token_embedding/embedding", "vocab embed"),
        ("text/position", "text_model/embeddings/position_embedding/embedding", "position embed"),
        *_flax_tower("text", "text_model"),
        ("text/projection/kernel", "text_projection/kernel", "embed joint"),
        ("logit_scale", "logit_scale"),
    ),
)

# A training checkpoint holds the parameters of the learned masks next to the weights.
_TRAINED = ("**l0_module**", "**num_batches_tracked", "_text_encoder.attn_mask")
_VISUAL, _TEXT = "_image_encoder.visual.", "_text_encoder."
_TOWERS = (*_resnet(_VISUAL), *_image_tower(_VISUAL), *_text_tower(_TEXT, affine=False))
ORIGINAL = Layout("original", (*_TOWERS, ("logit_scale", "_logit_scale.logit_scale")), _TRAINED)
