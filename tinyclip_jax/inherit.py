"""Weight inheritance as plans: by rule (TinyCLIP §3.3; weight_inherit.py), and by what learned masks keep (§3.2; l0module.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.maps import FRESH, PerLayer, Pick, even, every, first, pick, resize, scaled, sided
from heirloom.common.surgery.plan import Maps, Plan, Resolution, Source, build
from tinyclip_jax.masks import EXACT, TOWERS, MaskConfig, per_layer, tower_of
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig, head_dim, uniform
from tinyclip_jax.resnet import ResNetConfig, leading

DepthRule = Literal["interval", "even"]
_DEPTH = {"interval": every, "even": even}


def pick_layers(source: int, target: int, rule: DepthRule = "interval") -> list[int]:
    """The donor's layers a student of `target` layers takes: 12 -> 9 is the first nine by the released rule.

    Raises InputError when the donor is too shallow.
    """
    return _layers(source, target, rule).rows.tolist()


def manual(teacher: ClipConfig, student: ClipConfig, depth_rule: DepthRule = "interval") -> Plan:
    """The plan from a donor to a student no larger than it in any direction.

    Both towers are cut alike; the similarity scale is not inherited, as in the released code. `depth_rule="even"` spreads
    the layers. An image tower of another resolution has its position grid resampled.
    """
    text = ("text/**", _tower(teacher.text, student.text, depth_rule))
    if isinstance(teacher.image, ResNetConfig) or isinstance(student.image, ResNetConfig):
        return Plan((("logit_scale", FRESH), *_resnet(teacher, student), text))
    return Plan(
        (
            ("logit_scale", FRESH),
            ("image/position", _grid(teacher.image, student.image)),
            ("image/**", _tower(teacher.image, student.image, depth_rule)),
            text,
        )
    )


def _resnet(teacher: ClipConfig, student: ClipConfig) -> list[tuple[str, Maps]]:
    """Leading filters, statistics and heads, layer by layer: stages keep their depth."""
    if not (isinstance(teacher.image, ResNetConfig) and isinstance(student.image, ResNetConfig)):
        raise InputError("one image tower is a ResNet, the other a ViT: nothing of one can be inherited by the other")
    if teacher.image.blocks != student.image.blocks:
        raise InputError(f"the student's stages have {student.image.blocks} blocks, the donor's {teacher.image.blocks}: take these")
    if student.image.width > teacher.image.width:
        raise InputError(f"the student's width {student.image.width} exceeds the donor's {teacher.image.width}: nothing to cut from")
    return leading(functional(Clip, student).spec, "image/**")


def _tower(teacher: ImageConfig | TextConfig, student: ImageConfig | TextConfig, rule: DepthRule) -> Maps:
    for name in ("width", "heads", "hidden"):
        if isinstance(getattr(teacher, name), tuple) or isinstance(getattr(student, name), tuple):
            raise InputError(f"layers that differ in {name} have no leading part: go on from a pruned model with masks (masks.prune_step)")
        if getattr(student, name) > getattr(teacher, name):
            sizes = f"{getattr(student, name)} exceeds the donor's {getattr(teacher, name)}"
            raise InputError(f"the student's {name} {sizes}: nothing to cut from")
    return {
        "layer": _layers(teacher.layers, student.layers, rule),
        "embed": first(student.width),
        "head": first(int(student.heads)),  # type: ignore[arg-type]
        "hidden": first(int(student.hidden)),  # type: ignore[arg-type]
    }


def _grid(teacher: ImageConfig, student: ImageConfig) -> Maps:
    maps: dict[str, Pick] = {"embed": first(student.width)}
    if teacher.grid == student.grid:
        return maps
    grid = resize(teacher.grid, student.grid)
    return maps | {"grid_row": grid, "grid_col": grid}


def _layers(source: int, target: int, rule: DepthRule) -> Pick:
    if not 0 < target <= source:
        raise InputError(f"the student has {target} layers, the donor {source}: choose between 1 and {source}")
    return _DEPTH[rule](source, target)


def expand(donor: ClipConfig, student: ClipConfig) -> Plan:
    """The plan from a model, pruned or not, into the full-size one that masks are put on: what it has lost is zeros.

    The pruned model is the leading part of each axis (load_pruned_model of the release). Raises InputError when the donor is larger.
    """

    def tower(before: ImageConfig | TextConfig, now: ImageConfig | TextConfig) -> Maps:
        sizes = {"embed": (before.width, now.width), "head": (before.heads, now.heads), "hidden": (before.hidden, now.hidden)}
        return {axis: _extended(axis, max(1, *per_layer(n, 1)), max(per_layer(to, 1))) for axis, (n, to) in sizes.items()}

    towers = {name: tower(tower_of(donor, name), tower_of(student, name)) for name in TOWERS}
    return Plan((("logit_scale", {}), *((f"{name}/**", maps) for name, maps in towers.items())))


def _extended(axis: str, n: int, to: int) -> Pick:
    if n > to:
        raise InputError(f"the donor's {axis!r} is {n} and the student's {to}: masks are put on the original model, name its sizes")
    return first(n) if n == to else pick([*range(n), *[0] * (to - n)], np.array([1] * n + [0] * (to - n), np.float32))


@dataclass(frozen=True)
class Pruned:
    """A compact model: layers differ in heads and hidden units, and are zero-padded in memory. `resolution` says what became of what."""

    cfg: ClipConfig
    params: dict[str, np.ndarray]
    resolution: Resolution


def prune(cfg: ClipConfig, params: Mapping[str, np.ndarray], gates: Mapping[str, np.ndarray], how: MaskConfig = EXACT) -> Pruned:
    """Cut a masked model to what its gates keep, with their values folded into the weights: the same outputs.

    cfg, params: the full-size model, on the host. gates: `masks.deterministic_gates`. how: its two `legacy_*` fields count.
    """
    small = replace(cfg, image=_smaller(cfg, "image", gates), text=_smaller(cfg, "text", gates))
    plan = cutting(gates, how)
    resolution = plan.resolve(Source(functional(Clip, cfg).spec, params), functional(Clip, small).spec)
    return Pruned(small, {line.path: np.asarray(build(line)) for line in resolution.lines}, resolution)


def cutting(gates: Mapping[str, np.ndarray], how: MaskConfig = EXACT) -> Plan:
    """The plan of `prune`: rows with a gate above 0, in their order, scaled where they are written (embed) or read (head, hidden)."""
    rules: list[tuple[str, Any]] = [("logit_scale", {})]
    for tower in TOWERS:
        embed, head, hidden = (gates[f"masks/{tower}/{name}"] for name in ("embed", "head", "hidden"))
        rows = np.flatnonzero(embed)
        written = scaled(pick(rows), embed[rows])
        channels = sided(pick(rows), write=written)
        if how.legacy_drop_bias and not head.any(1).all():
            with_heads = pick(range(len(head)), np.asarray(head.any(1), np.float32))
            rules.append((f"{tower}/blocks/attn/out/bias", {"layer": with_heads, "embed": channels}))
        if how.legacy_proj_scale:
            rules.append((f"{tower}/projection/kernel", {"embed": written}))
        rules.append((f"{tower}/**", {"embed": channels, "head": _kept(head), "hidden": _kept(hidden)}))
    return Plan(rules)


def _kept(gates: np.ndarray) -> Any:
    """Per layer the rows with a gate above 0, padded with rows of zeros to the layer that keeps most. gates: [layer, rows]."""
    rows = [np.flatnonzero(layer) for layer in gates]
    longest = max(1, *map(len, rows))

    def padded(values: list[np.ndarray]) -> PerLayer:
        fill = [np.pad(kept, (0, longest - len(kept))) for kept in rows]
        return PerLayer(tuple(pick(r, np.pad(v, (0, longest - len(v)))) for r, v in zip(fill, values, strict=True)))

    ones = padded([np.ones(len(kept), np.float32) for kept in rows])
    return sided(ones, read=padded([layer[kept] for layer, kept in zip(gates, rows, strict=True)]))


def _smaller(cfg: ClipConfig, tower: str, gates: Mapping[str, np.ndarray]) -> Any:
    c = tower_of(cfg, tower)
    sizes = {name: tuple(np.count_nonzero(gates[f"masks/{tower}/{name}"], axis=1).tolist()) for name in ("head", "hidden")}
    width = int(np.count_nonzero(gates[f"masks/{tower}/embed"]))
    return replace(c, width=width, heads=uniform(sizes["head"]), hidden=uniform(sizes["hidden"]), head_dim=head_dim(c))
