"""Weight inheritance as plans: manual (TinyCLIP §3.3; weight_inherit.py), by learned masks (§3.2; l0module.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from heirloom.common.errors import InputError, remark
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.maps import FRESH, PerLayer, Pick, even, every, first, pick, resize, sided
from heirloom.common.surgery.plan import Maps, Plan, Resolution, Source, build
from tinyclip_jax.masks import EXACT, TOWERS, MaskConfig, per_layer, tower_of
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig, head_dim, uniform
from tinyclip_jax.resnet import ResNetConfig, leading
from tinyclip_jax.vit import VitImageConfig

DepthRule = Literal["interval", "even"]
Tower = ImageConfig | TextConfig | VitImageConfig
_DEPTH = {"interval": every, "even": even}
# Fields of a tower that its tensors show, and those that change no result.
_SIZES = {"size", "patch", "width", "layers", "heads", "hidden", "head_dim", "blocks", "context", "vocab"}
_RUNNING = {"remat", "kernel", "tying", "drop_path", "resample"}


def pick_layers(source: int, target: int, rule: DepthRule = "interval") -> list[int]:
    """Indices of the donor's layers for a student of `target` layers: 12 -> 9 is the first nine, as released.

    Raises InputError when the donor has fewer layers than `target`.
    """
    return _layers(source, target, rule).rows.tolist()


def manual(teacher: ClipConfig, student: ClipConfig, depth_rule: DepthRule = "interval") -> Plan:
    """Plan of manual inheritance: leading channels and heads, and every n-th layer (TinyCLIP §3.3).

    The student must not be larger in any size. Both towers follow the same rule; the similarity scale is not inherited,
    as in the released code, but the bias of a sigmoid loss is (SigLIP): affinity mimicking does not train it.
    `depth_rule="even"` spreads the layers evenly. For another resolution the position grid is resampled; of a longer
    context the student takes the first positions.
    """
    scalars: list[tuple[str, Any]] = [("logit_scale", FRESH)]
    scalars += [("logit_bias", {} if teacher.logit_bias else FRESH)] if student.logit_bias else []
    text = ("text/**", _tower(teacher.text, student.text, depth_rule) | _positions(teacher.text, student.text))
    if student.joint != teacher.joint:
        sizes = f"the student's joint is {student.joint}, the donor's {teacher.joint}"
        raise InputError(f"{sizes}: set student.joint to it")
    if isinstance(teacher.image, ResNetConfig) or isinstance(student.image, ResNetConfig):
        rules = _resnet(teacher, student)
        _compare(teacher, student)
        return Plan((*scalars, *rules, text))
    if type(teacher.image) is not type(student.image):
        needed = "choose a donor and a student of the same kind"
        raise InputError(f"one image tower is CLIP's ViT, the other timm's, with other parameters: {needed}")
    position = ("image/position", _grid(teacher.image, student.image))
    image = ("image/**", _tower(teacher.image, student.image, depth_rule))
    _compare(teacher, student)
    return Plan((*scalars, position, image, text))


def _resnet(teacher: ClipConfig, student: ClipConfig) -> list[tuple[str, Maps]]:
    """Rules for leading filters, statistics and heads of each layer; stages keep their depth."""
    if not (isinstance(teacher.image, ResNetConfig) and isinstance(student.image, ResNetConfig)):
        raise InputError("one image tower is a ResNet, the other a ViT: choose a donor and a student of the same kind")
    if teacher.image.blocks != student.image.blocks:
        stages = f"{student.image.blocks} blocks, the donor's {teacher.image.blocks}"
        raise InputError(f"the student's stages have {stages}: set student.image.blocks to these")
    if student.image.width > teacher.image.width:
        widths = f"width {student.image.width} exceeds the donor's {teacher.image.width}"
        raise InputError(f"the student's {widths}: set student.image.width to at most this")
    return leading(functional(Clip, student).spec)


def _tower(teacher: Tower, student: Tower, rule: DepthRule) -> dict[str, Pick]:
    where = f"student.{'text' if isinstance(student, TextConfig) else 'image'}"
    for name in ("patch", "vocab"):
        if getattr(student, name, None) != (donors := getattr(teacher, name, None)):
            sizes = f"the student's {name} is {getattr(student, name)}, the donor's {donors}"
            raise InputError(f"{sizes}: set {where}.{name} to it")
    for name in ("width", "heads", "hidden"):
        if isinstance(getattr(teacher, name), tuple) or isinstance(getattr(student, name), tuple):
            inherit = "inherit from a pruned model with masks (masks.prune_step)"
            raise InputError(f"layers differ in {name}, and manual inheritance needs equal ones: {inherit}")
        if getattr(student, name) > getattr(teacher, name):
            sizes = f"{getattr(student, name)} exceeds the donor's {getattr(teacher, name)}"
            raise InputError(f"the student's {name} {sizes}: set it to at most this")
    if head_dim(student) != (channels := head_dim(teacher)):
        count, rest = divmod(student.width, channels)
        fits = not rest and count <= int(teacher.heads) and not vars(student).get("head_dim")  # type: ignore[arg-type]
        other = f"head_dim to {channels}" if "head_dim" in vars(student) else f"width to a multiple of {channels}"
        sizes = f"heads have {head_dim(student)} channels, the donor's {channels}"
        raise InputError(f"the student's {sizes}: set {where}.{f'heads to {count}' if fits else other}")
    return {
        "layer": _layers(teacher.layers, student.layers, rule),
        "embed": first(student.width),
        "head": first(int(student.heads)),  # type: ignore[arg-type]
        "hidden": first(int(student.hidden)),  # type: ignore[arg-type]
    }


def _positions(teacher: TextConfig, student: TextConfig) -> dict[str, Pick]:
    if student.context == teacher.context:
        return {}
    sizes = f"the student's context is {student.context}, the donor's {teacher.context}"
    if student.context > teacher.context:
        raise InputError(f"{sizes}: set student.text.context to at most this")
    remark(f"{sizes}: the first {student.context} positions are inherited, and longer captions are cut there")
    return {"position": first(student.context)}


def _compare(donor: ClipConfig, student: ClipConfig) -> None:
    """Remarks settings that differ and are no sizes, and trained parameters of the donor that the student lacks.

    Raises InputError for parameters that the donor lacks.
    """
    theirs, own = (functional(Clip, cfg).spec.keys() for cfg in (donor, student))
    ways = []
    for tower in TOWERS:
        before, now = (vars(getattr(cfg, tower)) for cfg in (donor, student))
        for name in sorted((before.keys() & now.keys()) - _SIZES - _RUNNING):
            # Of LayerScale the config has the first value, and the weights are inherited.
            same = bool(before[name]) == bool(now[name]) if name == "layer_scale" else before[name] == now[name]
            if not same:
                ways.append(f"student.{tower}.{name} to {before[name]!r}")
                trained = "the weights were trained with the donor's"
                sizes = f"the donor's {name} is {before[name]!r}, the student's {now[name]!r}"
                remark(f"{sizes}: {trained}; set student.{tower}.{name} to it")
    if lacked := sorted(own - theirs - {"logit_bias"}):
        raise InputError(f"the student has {_some(lacked)}, but the donor does not: set {' and '.join(ways)}")
    if left := sorted(theirs - own):
        remark(f"the student does not have these parameters of the donor, so they are not inherited: {_some(left)}")


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} others" if len(paths) > 4 else "")


def _grid(teacher: ImageConfig | VitImageConfig, student: ImageConfig | VitImageConfig) -> Maps:
    maps: dict[str, Pick] = {"embed": first(student.width)}
    before, now = teacher.size // teacher.patch, student.size // student.patch
    if before == now:
        return maps
    grid = resize(before, now)
    return maps | {"grid_row": grid, "grid_col": grid}


def _layers(source: int, target: int, rule: DepthRule) -> Pick:
    if not 0 < target <= source:
        raise InputError(f"the student has {target} layers, the donor {source}: choose 1 to {source} for the student")
    return _DEPTH[rule](source, target)


def expand(donor: ClipConfig, student: ClipConfig) -> Plan:
    """Plan from a model, pruned or not, to the full-size one for learned masks; removed rows become zeros.

    The pruned model fills the leading part of each axis (load_pruned_model of the release). Raises InputError when the
    donor is larger.
    """

    def tower(source: ImageConfig | TextConfig, target: ImageConfig | TextConfig) -> Maps:
        sizes = {"embed": (source.width, target.width), "head": (source.heads, target.heads)}
        sizes |= {"hidden": (source.hidden, target.hidden)}
        axes = ((axis, max(1, *per_layer(n, 1)), max(per_layer(to, 1))) for axis, (n, to) in sizes.items())
        return {axis: _zero_padded(axis, n, to) for axis, n, to in axes}

    towers = {name: tower(tower_of(donor, name), tower_of(student, name)) for name in TOWERS}
    _compare(donor, student)
    return Plan((*_scalars(student), *((f"{name}/**", maps) for name, maps in towers.items())))


def _scalars(cfg: ClipConfig) -> list[tuple[str, Any]]:
    """Rules that copy the scale and, if there is one, the bias of the similarities."""
    return [("logit_scale", {}), *([("logit_bias", {})] if cfg.logit_bias else [])]


def _zero_padded(axis: str, n: int, to: int) -> Pick:
    if n > to:
        needed = "masks need the original model, set the student to its sizes"
        raise InputError(f"the donor's {axis!r} is {n}, the student's {to}: {needed}")
    return first(n) if n == to else pick([*range(n), *[0] * (to - n)], np.array([1] * n + [0] * (to - n), np.float32))


@dataclass(frozen=True)
class Pruned:
    """A pruned model, its layers zero-padded in memory where sizes differ. resolution: source of each tensor."""

    cfg: ClipConfig
    params: dict[str, np.ndarray]
    resolution: Resolution


def prune(
    cfg: ClipConfig, params: Mapping[str, np.ndarray], gates: Mapping[str, np.ndarray], how: MaskConfig = EXACT
) -> Pruned:
    """Remove a masked model's rows with gate 0, multiply other gates into the weights: outputs stay the same.

    cfg, params: the full-size model, on the host. gates: `masks.deterministic_gates`. how: only its two `legacy_*`
    fields are used.
    """
    small = replace(cfg, image=_smaller(cfg, "image", gates), text=_smaller(cfg, "text", gates))
    plan = pruning_plan(cfg, gates, how)
    resolution = plan.resolve(Source(functional(Clip, cfg).spec, params), functional(Clip, small).spec)
    return Pruned(small, {line.path: np.asarray(build(line)) for line in resolution.lines}, resolution)


def pruning_plan(cfg: ClipConfig, gates: Mapping[str, np.ndarray], how: MaskConfig = EXACT) -> Plan:
    """Plan of `prune`: rows with a gate above 0, in order, scaled where written (embed) or read (head, hidden)."""
    rules = _scalars(cfg)
    for tower in TOWERS:
        embed, head, hidden = (gates[f"masks/{tower}/{name}"] for name in ("embed", "head", "hidden"))
        rows = np.flatnonzero(embed)
        written = pick(rows, embed[rows])
        channels = sided(pick(rows), write=written)
        if how.legacy_drop_bias and not head.any(1).all():
            with_heads = pick(range(len(head)), np.asarray(head.any(1), np.float32))
            rules.append((f"{tower}/blocks/attn/out/bias", {"layer": with_heads, "embed": channels}))
        if how.legacy_proj_scale:
            rules.append((f"{tower}/projection/kernel", {"embed": written}))
        rules.append((f"{tower}/**", {"embed": channels, "head": _kept(head), "hidden": _kept(hidden)}))
    return Plan(rules)


def _kept(gates: np.ndarray) -> Any:
    """Maps to the rows of each layer with a gate above 0, zero-padded to the largest layer. gates: [layer, rows]."""
    rows = [np.flatnonzero(layer) for layer in gates]
    longest = max(1, *map(len, rows))

    def padded(values: list[np.ndarray]) -> PerLayer:
        fill = [np.pad(kept, (0, longest - len(kept))) for kept in rows]
        return PerLayer(tuple(pick(r, np.pad(v, (0, longest - len(v)))) for r, v in zip(fill, values, strict=True)))

    ones = padded([np.ones(len(kept), np.float32) for kept in rows])
    return sided(ones, read=padded([layer[kept] for layer, kept in zip(gates, rows, strict=True)]))


def _smaller(cfg: ClipConfig, tower: str, gates: Mapping[str, np.ndarray]) -> Any:
    c = tower_of(cfg, tower)
    masks = {name: gates[f"masks/{tower}/{name}"] for name in ("head", "hidden")}
    sizes = {name: tuple(np.count_nonzero(gate, axis=1).tolist()) for name, gate in masks.items()}
    width = int(np.count_nonzero(gates[f"masks/{tower}/embed"]))
    return replace(c, width=width, heads=uniform(sizes["head"]), hidden=uniform(sizes["hidden"]), head_dim=head_dim(c))
