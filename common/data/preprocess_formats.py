"""Preprocessing in the files of other libraries, both ways: transformers, open_clip, timm. What cannot be honoured is refused by name."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.weights import read_json, write_json
from heirloom.common.data.preprocess import FILE, FILTERS, Channels, Mode, Preprocess
from heirloom.common.errors import InputError, nearest, remark

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
OPEN_CLIP, TIMM = "open_clip_config.json", "config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BYTE = 255  # pixels of a PIL picture are 0..255; ours are divided by it

# transformers' image processors: what each takes for a field that its file leaves out. `square`: an integer size squashes.
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": dict(resample=3, size={"shortest_edge": 224}, do_center_crop=True, crop_size=224, square=False, do_convert_rgb=True),
    "ViT": dict(resample=2, size={"height": 224, "width": 224}, do_center_crop=False, crop_size=None, square=True, do_convert_rgb=False),
    "DeiT": dict(resample=3, size={"height": 256, "width": 256}, do_center_crop=True, crop_size=224, square=True, do_convert_rgb=False),
    "Siglip": dict(resample=3, size={"height": 224, "width": 224}, do_center_crop=False, crop_size=None, square=False, do_convert_rgb=True),
}
_PROCESSING = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize")
_HANDLED = {*_PROCESSING, "image_mean", "image_std", "do_convert_rgb", "default_to_square"}
# Fields that change no pixel.
_INERT = {"processor_class", "return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "image_seq_length"}
_INERT |= {"image_processor_type", "feature_extractor_type", "transformers_version"}
_INERT |= {"pad_size"}  # do_pad, which would use the size, is refused


@dataclass(frozen=True)
class Found:
    """The preprocessing of a checkpoint, and where it comes from.

    origin: the file it was read from; empty when the checkpoint has none. note: one line for the user about what was assumed, or empty.
    """

    pre: Preprocess
    origin: str
    note: str = ""

    def announced(self) -> Preprocess:
        """Remark the note, if there is one, and return the preprocessing."""
        if self.note:
            remark(self.note)
        return self.pre


def find(folder: Path, format: str, size: int, assumed: Preprocess, whose: str) -> Found:
    """Read the preprocessing that travels with a checkpoint: ours, or that of the checkpoint's own format, or of another one.

    folder: where the weights are. format: of the weights. size: side of the pictures that the model sees, in pixels.
    assumed: of that size, taken where there is no file; `whose` says what it is ("CLIP's own").
    Raises InputError for a file that is damaged, asks for what is not supported, or belongs to pictures of another size.
    """
    if (file := folder / FILE).is_file():
        pre = Preprocess.load(file)
        if pre.size != size:
            raise InputError(f"{file}: size is {pre.size}, the model sees {size} x {size} pixels; take the file of this model")
        return Found(pre, FILE)
    for name in sorted(_READERS, key=lambda name: name != format):
        if found := _READERS[name](folder, size):
            return found
    pre = assumed
    how = f"mean {_short(pre.mean)}, std {_short(pre.std)}, {pre.interpolation}, {pre.mode} side to {pre.resize or pre.size}, crop {size}"
    return Found(pre, "", f"preprocessing: none with {folder}; {whose} is assumed ({how}); to change it, convert and edit {FILE}")


def write(pre: Preprocess, folder: Path, format: str) -> None:
    """Write preprocessing in the words of a format; ours next to weights of formats that have none.

    How the crop's corner is rounded, and in transformers that pictures are composited on white, no file can change.
    Raises InputError for what the format cannot express.
    """
    if pre.background != "none" and format in ("open_clip", "timm"):
        remark(f"{format} has no word for background {pre.background!r}: composite transparent pictures yourself there")
    _WRITERS.get(format, lambda pre, folder: pre.save(folder))(pre, folder)


def _short(values: Channels) -> str:
    return "/".join(f"{v:.3g}" for v in values)


@dataclass(frozen=True)
class _Fields:
    """A foreign JSON object whose values are checked by type as they are read; null counts as missing."""

    file: Path
    values: Mapping[str, Any]

    def fail(self, name: str, needed: str) -> InputError:
        return InputError(f"{self.file}: {name} is {self.values.get(name)!r}; {needed}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any, valid: Callable[[Any], bool], needed: str) -> Any:
        if not self.has(name):
            return default
        if not valid(self.values[name]):
            raise self.fail(name, f"it must be {needed}")
        return self.values[name]

    def flag(self, name: str, default: bool) -> bool:
        found: bool = self._get(name, default, lambda v: isinstance(v, bool), "true or false")
        return found

    def number(self, name: str, default: float) -> float:
        return float(self._get(name, default, lambda v: _finite(v) and v > 0, "a finite number above 0"))

    def channels(self, name: str, default: Channels | None, least: float = -math.inf) -> Channels:
        """Three numbers, of which a file may give one."""
        if default is None and not self.has(name):
            raise InputError(f"{self.file}: {name!r} is missing; take the original's file")

        def valid(v: Any) -> bool:
            several = v if isinstance(v, list) else [v]
            return len(several) in (1, 3) and all(_finite(x) and x > least for x in several)

        found = self._get(name, default, valid, f"one or three finite numbers{' above 0' if least == 0 else ''}")
        several = found if isinstance(found, list | tuple) else [found]
        first, second, third = (float(v) for v in (several if len(several) == 3 else several * 3))
        return first, second, third

    def choice(self, name: str, default: str, choices: Any) -> str:
        needed = f"one of {', '.join(choices)}"
        found: str = self._get(name, default, lambda v: isinstance(v, str) and v in choices, needed)
        return found

    def square(self, name: str, default: Any = None) -> int:
        """A side in pixels, given once or as height and width."""
        value = self.values[name] if self.has(name) else default
        if isinstance(value, dict):
            given = {name: side for name, side in value.items() if side is not None}
            value = list(given.values()) if given.keys() == {"height", "width"} else None
        sides = value if isinstance(value, list) else [value]
        if len(sides) not in (1, 2) or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in sides):
            raise self.fail(name, "it must be a number of pixels, or height and width")
        if len(set(sides)) > 1:
            raise self.fail(name, "only squares are read")
        return int(sides[0])

    def pre(self, **settings: Any) -> Preprocess:
        try:
            return Preprocess(**settings)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_hf(folder: Path, size: int) -> Found | None:
    """transformers' file. With two of them it takes `image_processor` of processor_config.json, and so do we."""
    origin, fields = PROCESSOR, None
    if (folder / PROCESSOR).is_file() and "image_processor" in (whole := read_json(folder / PROCESSOR)):
        if not isinstance(inner := whole["image_processor"], dict):
            raise InputError(f"{folder / PROCESSOR}: image_processor is {inner!r}; it must be an object")
        fields = _Fields(folder / PROCESSOR, inner)
    elif (folder / PREPROCESSOR).is_file():
        origin, fields = PREPROCESSOR, _Fields(folder / PREPROCESSOR, read_json(folder / PREPROCESSOR))
    if fields is None:
        return None
    defaults = _Defaults(fields, _processor(folder, fields))
    for name, value in fields.values.items():
        if name not in _HANDLED | _INERT and not name.startswith("_") and value not in (None, False):
            raise fields.fail(name, f"this processing is not supported{nearest(name, _HANDLED)}")
    mean, std = _folded(fields)
    filters = {int(f): name for name, f in FILTERS.items()}
    if not isinstance(number := defaults("resample"), int) or isinstance(number, bool) or number not in filters:
        raise InputError(f"{fields.file}: no resampling filter {number!r} (Pillow has 0 to 5)")
    if not fields.flag("do_resize", True):
        raise fields.fail("do_resize", "models here see pictures of one size, so a picture must be resized")
    note = ""
    if not fields.has("size") and not fields.has("crop_size"):
        side, mode, cropped = _hf_size(defaults, fields)
        if cropped != size:
            note = f"preprocessing: {fields.file} has no size; the model's own, {size}, is assumed"
            side, cropped = round(side * size / cropped), size
    else:
        side, mode, cropped = _hf_size(defaults, fields)
    if cropped != size:
        name = "crop_size" if defaults("do_center_crop") else "size"
        raise fields.fail(name, f"the model sees {size} x {size} pixels")
    # Its conversion to RGB composites on white; without it a transparent picture has four channels, which no model here takes.
    background = "white" if fields.flag("do_convert_rgb", defaults.known("do_convert_rgb", False)) else "none"
    shape = dict(size=size, resize=side, mode=mode, corner="down", interpolation=filters[number], background=background)
    return Found(fields.pre(mean=mean, std=std, **shape), origin, note)


def _processor(folder: Path, fields: _Fields) -> str | None:
    """Which of transformers' processors a file is for: CLIP, ViT, ...; None when neither it nor config.json says so."""
    for name in ("image_processor_type", "feature_extractor_type"):
        if fields.has(name):
            kind = re.fullmatch(rf"({'|'.join(_PROCESSORS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(fields.values[name]))
            if kind is None:
                raise fields.fail(name, f"processors of {', '.join(_PROCESSORS)} are read")
            return kind[1]
    model = read_json(folder / TIMM).get("model_type") if (folder / TIMM).is_file() else None
    return next((kind for kind in _PROCESSORS if kind.lower() == model), None)


@dataclass(frozen=True)
class _Defaults:
    """A field of a processor's file, or what this kind of processor takes instead."""

    fields: _Fields
    kind: str | None

    def __call__(self, name: str) -> Any:
        if self.fields.has(name):
            return self.fields.values[name]
        if self.kind is None:
            raise InputError(f"{self.fields.file}: {name} depends on image_processor_type, which is missing; add it (CLIPImageProcessor)")
        return _PROCESSORS[self.kind][name]

    def known(self, name: str, otherwise: Any) -> Any:
        """What this kind of processor takes, or `otherwise` where the kind is unknown."""
        return otherwise if self.kind is None else _PROCESSORS[self.kind][name]


def _hf_size(defaults: _Defaults, fields: _Fields) -> tuple[int, Mode, int]:
    """Side after the resize, which side that is, and side of what is left of the picture."""
    size = defaults("size")
    if isinstance(size, int) and not isinstance(size, bool):
        squash = fields.flag("default_to_square", False) if fields.has("default_to_square") else defaults("square")
        size = {"height": size, "width": size} if squash else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    given = {name: side for name, side in size.items() if side is not None} if isinstance(size, dict) else {}
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in given.values()):
        raise fields.fail("size", "sides are whole numbers of pixels, 1 or more")
    crop = fields.flag("do_center_crop", defaults("do_center_crop"))
    if given.keys() == {"shortest_edge"}:
        side, mode = given["shortest_edge"], "shortest"
        if not crop:
            raise fields.fail("do_center_crop", "without a crop the pictures would not be square, which the model needs")
    elif given.keys() == {"height", "width"}:
        side, mode = given["height"], "squash"
        if given["width"] != side:
            raise fields.fail("size", "only squares are read")
    else:
        raise fields.fail("size", "it must be a number of pixels, shortest_edge, or height and width")
    return side, mode, fields.square("crop_size", defaults("crop_size")) if crop else side  # type: ignore[return-value]


def _folded(fields: _Fields) -> tuple[Channels, Channels]:
    """Mean and std of values in 0..1, whatever the file multiplies pixels by before it normalises them."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if fields.flag("do_normalize", True):
        mean, std = fields.channels("image_mean", None), fields.channels("image_std", None, least=0)
    factor = fields.number("rescale_factor", 1 / _BYTE) if fields.flag("do_rescale", True) else 1.0
    first, second = (tuple(value / (_BYTE * factor) for value in values) for values in (mean, std))
    return first, second  # type: ignore[return-value]


def _read_open_clip(folder: Path, size: int) -> Found | None:
    if not (folder / OPEN_CLIP).is_file() or (theirs := read_json(folder / OPEN_CLIP).get("preprocess_cfg")) is None:
        return None
    if not isinstance(theirs, dict):
        raise InputError(f"{folder / OPEN_CLIP}: preprocess_cfg is {theirs!r}; it must be an object")
    fields, default = _Fields(folder / OPEN_CLIP, theirs), Preprocess()
    for name in theirs:
        if name not in (known := ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")):
            raise fields.fail(name, f"preprocess_cfg has no such field{nearest(name, known)}")
    if fields.square("size", size) != size:
        raise fields.fail("size", f"the model sees {size} x {size} pixels")
    fields.choice("mode", "RGB", ["RGB"])
    filter = fields.choice("interpolation", "bicubic", ["bicubic", "bilinear", "random"])
    pre = fields.pre(
        size=size,
        mean=fields.channels("mean", default.mean),
        std=fields.channels("std", default.std, least=0),
        interpolation="bicubic" if filter == "random" else filter,  # open_clip evaluates with bicubic then
        resize=size,
        mode=fields.choice("resize_mode", "shortest", ["shortest", "squash", "longest"]),
        fill=theirs.get("fill_color") or 0,
    )
    return Found(pre, OPEN_CLIP)


def _read_timm(folder: Path, size: int) -> Found | None:
    """timm's `pretrained_cfg`; old files have its fields at the top. A field left out is timm's default."""
    if not (folder / TIMM).is_file() or "architecture" not in (whole := read_json(folder / TIMM)):
        return None
    theirs = whole.get("pretrained_cfg", whole)
    if not isinstance(theirs, dict):
        raise InputError(f"{folder / TIMM}: pretrained_cfg is {theirs!r}; it must be an object")
    fields = _Fields(folder / TIMM, theirs)
    if not any(fields.has(name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")):
        return None
    if fields.has("crop_border_pixels"):
        raise fields.fail("crop_border_pixels", "this processing is not supported")
    note, seen = "", theirs.get("input_size")
    if seen is not None:
        if not (isinstance(seen, list) and len(seen) == 3 and all(isinstance(v, int) and v >= 1 for v in seen)):
            raise fields.fail("input_size", "it must be channels, height and width")
        if seen[1:] != [size, size]:
            note = f"preprocessing: {folder / TIMM} is for pictures of {seen[1]} x {seen[2]}; the model sees {size}, which is taken"
    if (mode := fields.choice("crop_mode", "center", ["center", "squash", "border"])) == "border":
        raise fields.fail("crop_mode", "padding with a border is not supported; center and squash are")
    pre = fields.pre(
        size=size,
        mean=fields.channels("mean", IMAGENET_MEAN),
        std=fields.channels("std", IMAGENET_STD, least=0),
        interpolation=fields.choice("interpolation", "bicubic", FILTERS),
        mode="squash" if mode == "squash" else "shortest",
    )
    share = fields.number("crop_pct", 0.875)
    if share > 1:
        raise fields.fail("crop_pct", "it must be at most 1")
    return Found(pre.cropped(share), TIMM, note)


def _write_hf(pre: Preprocess, folder: Path) -> None:
    if pre.mode == "longest":
        raise InputError("transformers' image processors of CLIP and ViT do not pad; this model's preprocessing does (mode 'longest')")
    side, crop = pre.resize or pre.size, {"height": pre.size, "width": pre.size}
    flags = dict(do_resize=True, do_rescale=True, rescale_factor=1 / _BYTE, do_normalize=True, do_convert_rgb=True)
    about: dict[str, Any] = flags | dict(resample=int(pre.filter), image_mean=list(pre.mean), image_std=list(pre.std))
    if pre.mode == "shortest":
        about |= dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": side}, do_center_crop=True, crop_size=crop)
    elif side == pre.size:
        about |= dict(image_processor_type="ViTImageProcessor", size=crop)
    else:
        size = {"height": side, "width": side}
        about |= dict(image_processor_type="DeiTImageProcessor", size=size, do_center_crop=True, crop_size=crop)
    write_json(folder / PREPROCESSOR, about)


def _write_open_clip(pre: Preprocess, folder: Path) -> None:
    if pre.resize not in (None, pre.size):
        raise InputError(f"open_clip resizes to the size it crops; this model's preprocessing resizes to {pre.resize} and crops {pre.size}")
    if pre.interpolation not in ("bicubic", "bilinear"):
        raise InputError(f"open_clip resizes by bicubic or bilinear interpolation, this model's preprocessing by {pre.interpolation}")
    about: dict[str, Any] = dict(mean=list(pre.mean), std=list(pre.std), interpolation=pre.interpolation, resize_mode=pre.mode)
    about |= dict(fill_color=pre.fill) if pre.mode == "longest" else {}
    write_json(folder / OPEN_CLIP, read_json(folder / OPEN_CLIP) | dict(preprocess_cfg=about))


def _write_timm(pre: Preprocess, folder: Path) -> None:
    if pre.mode == "longest":
        raise InputError("timm pads with the mean colour only; this model's preprocessing pads (mode 'longest')")
    side = pre.resize or pre.size
    shares = (pre.size / side, pre.size / (side + 0.5))  # the first, unless floor(size / share) falls one short
    share = next(share for share in shares if replace(pre, resize=None).cropped(share).resize == side)
    theirs = read_json(folder / TIMM)
    about: dict[str, Any] = dict(mean=list(pre.mean), std=list(pre.std), interpolation=pre.interpolation, crop_pct=share)
    about |= dict(crop_mode="squash" if pre.mode == "squash" else "center")
    write_json(folder / TIMM, theirs | dict(pretrained_cfg=theirs.get("pretrained_cfg", {}) | about))


_READERS: dict[str, Callable[[Path, int], Found | None]] = {"hf": _read_hf, "open_clip": _read_open_clip, "timm": _read_timm}
_WRITERS: dict[str, Callable[[Preprocess, Path], None]] = {"hf": _write_hf, "open_clip": _write_open_clip, "timm": _write_timm}
