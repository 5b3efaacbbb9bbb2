"""Reads and writes preprocessing in the files of transformers, open_clip and timm; refuses unsupported fields."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.data.pictures import Background
from heirloom.common.data.preprocess import FILE, FILTERS, Channels, Mode, Preprocess
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.files import read_json, write_json

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
OPEN_CLIP, TIMM = "open_clip_config.json", "config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BYTE = 255  # largest pixel value; our pixels are divided by it

# Defaults of transformers' image processors. With `default_to_square` an integer size squashes.
_OPENAI = dict(image_mean=list(Preprocess().mean), image_std=list(Preprocess().std))
_HALF = dict(image_mean=0.5, image_std=0.5)
_CROPPED, _SQUASHED = dict(do_center_crop=True, crop_size=224), dict(do_center_crop=False, crop_size=None)
_SHORTEST = dict(size={"shortest_edge": 224}, default_to_square=False)
_SQUARE = {"height": 224, "width": 224}
_LARGER = {"height": 256, "width": 256}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _OPENAI | _CROPPED | _SHORTEST | dict(resample=3, do_convert_rgb=True),
    "ViT": _HALF | _SQUASHED | dict(resample=2, size=_SQUARE, default_to_square=True, do_convert_rgb=False),
    "DeiT": _HALF | _CROPPED | dict(resample=3, size=_LARGER, default_to_square=True, do_convert_rgb=False),
    "Bit": _OPENAI | _CROPPED | _SHORTEST | dict(resample=3, do_convert_rgb=True),
    "Siglip": _HALF | _SQUASHED | dict(resample=3, size=_SQUARE, default_to_square=False, do_convert_rgb=True),
}
_PROCESSING: tuple[str, ...] = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
_PROCESSING += ("do_rescale", "rescale_factor", "do_normalize")
_HANDLED = {*_PROCESSING, "image_mean", "image_std", "do_convert_rgb", "default_to_square"}
# Fields that change no pixel.
_INERT = {"processor_class", "return_tensors", "data_format", "input_data_format"}
_INERT |= {"device", "disable_grouping", "image_seq_length"}
_INERT |= {"image_processor_type", "feature_extractor_type", "transformers_version"}
_INERT |= {"use_fast"}  # which library computes it
_INERT |= {"pad_size"}  # only used by do_pad, which is refused


_ALPHA: dict[Background, str] = {
    "none": "drops alpha before it resizes",
    "last": "resizes before it drops alpha",
    "white": "puts transparent pictures on white",
}


@dataclass(frozen=True)
class Found:
    """The preprocessing of a checkpoint and its origin.

    origin: the file it was read from; empty when the checkpoint has none. note: a line for the user about assumptions,
    or empty.
    """

    pre: Preprocess
    origin: str
    note: str = ""

    def announced(self) -> Preprocess:
        """Remarks the note, if there is one, and returns the preprocessing."""
        if self.note:
            remark(self.note)
        return self.pre


def find(folder: Path, format: str, size: int, assumed: Preprocess, whose: str) -> Found:
    """Reads the preprocessing next to a checkpoint: our file, else that of its format, else of another format.

    folder: folder of the weights. format: of the weights. size: side of the model's input, in pixels.
    assumed: default of that size, for a folder without such files. whose: name of the default ("CLIP's own").
    Raises InputError for a file that is damaged, has unsupported settings, or is for pictures of another size.
    """
    if (file := folder / FILE).is_file():
        pre = Preprocess.load(file)
        if pre.size != size:
            takes = f"the model takes {size} x {size} pixels"
            raise InputError(f"{file}: size is {pre.size}, and {takes}; use the file of this model")
        return Found(pre, FILE)
    for name in sorted(_READERS, key=lambda name: name != format):
        if found := _READERS[name](folder, size):
            return found
    pre = assumed
    statistics = f"mean {_short(pre.mean)}, std {_short(pre.std)}"
    how = f"{statistics}, {pre.interpolation}, {pre.mode} side to {pre.resize or pre.size}, crop {size}"
    note = f"preprocessing: none with {folder}; {whose} is assumed ({how}); to change it, convert and edit {FILE}"
    return Found(pre, "", note)


def size_of(folder: Path) -> int | None:
    """Returns the side of the pictures that the preprocessing of a folder makes, in pixels, for a model of any size.

    None where neither our file nor transformers' says it.
    """
    if (file := folder / FILE).is_file():
        return Preprocess.load(file).size
    if (theirs := _hf_file(folder)) is None or not {"size", "crop_size"} & set(theirs.given):
        return None
    return _hf_size(theirs.fields)[2]


def write(pre: Preprocess, folder: Path, format: str) -> None:
    """Writes preprocessing in the file of a format; our file for formats without one.

    No format can express the rounding of the crop's corner, and each has one background, which is remarked.
    Raises InputError for settings that the format cannot express.
    """
    library = {"hf": "transformers", "flax": "transformers"}.get(format, format)
    own: dict[str, Background] = {"open_clip": "last", "timm": "none", "transformers": "white"}
    if (theirs := own.get(library, pre.background)) != pre.background:
        differ = f"{library} {_ALPHA[theirs]}, and this model {_ALPHA[pre.background]}"
        remark(f"{differ}: convert transparent pictures yourself there")
    _WRITERS.get(format, lambda pre, folder: pre.save(folder))(pre, folder)


def _short(values: Channels) -> str:
    return "/".join(f"{v:.3g}" for v in values)


def _preprocess(fields: Fields, **settings: Any) -> Preprocess:
    try:
        return Preprocess(**settings)
    except InputError as error:
        raise InputError(f"{fields.where}: {error}") from error


@dataclass(frozen=True)
class _HfFile:
    """transformers' file. given: its fields. fields: with the defaults of its processor."""

    origin: str
    given: Fields
    fields: Fields


def _hf_file(folder: Path) -> _HfFile | None:
    """Opens transformers' file. Of two files it takes `image_processor` of processor_config.json, like transformers."""
    if (folder / PROCESSOR).is_file() and "image_processor" in (whole := read_json(folder / PROCESSOR)):
        origin, given = PROCESSOR, Fields(whole["image_processor"], f"{folder / PROCESSOR}: image_processor")
    elif (folder / PREPROCESSOR).is_file():
        origin, given = PREPROCESSOR, Fields.load(folder / PREPROCESSOR)
    else:
        return None
    given = given.with_defaults()
    kind = _processor(folder, given)  # first: the fields of another processor would be called unknown
    for name in given:
        if name not in _HANDLED | _INERT and not name.startswith("_") and given.value(name) is not False:
            raise given.refusal(name, f"this processing is not supported{nearest(name, _HANDLED)}")
    absent = "use the original's file"
    if kind is None:
        absent = "add it, or the image_processor_type that it depends on (CLIPImageProcessor)"
    return _HfFile(origin, given, given.with_defaults(_PROCESSORS.get(kind or ""), absent))


def _read_hf(folder: Path, size: int) -> Found | None:
    """Reads transformers' file."""
    if (theirs := _hf_file(folder)) is None:
        return None
    given, fields = theirs.given, theirs.fields
    mean, std = _folded(fields)
    filters = {int(f): name for name, f in FILTERS.items()}
    resample = fields.integer("resample", least=min(filters), most=max(filters))
    if not fields.boolean("do_resize", True):
        raise fields.refusal("do_resize", "models take pictures of one size, so pictures must be resized")
    side, mode, cropped = _hf_size(fields)
    note = ""
    if "size" not in given and "crop_size" not in given and cropped != size:
        note = f"preprocessing: {fields.where} has no size; the size of the model, {size}, is assumed"
        side, cropped = round(side * size / cropped), size
    if cropped != size:
        name = "crop_size" if fields.boolean("do_center_crop") else "size"
        raise fields.refusal(name, f"the model takes {size} x {size} pixels")
    # transformers composites on white to convert to RGB; else a transparent picture keeps four channels.
    background = "white" if fields.boolean("do_convert_rgb", False) else "none"
    shape = dict(size=size, resize=side, mode=mode, corner="down")
    shape |= dict(interpolation=filters[resample], background=background)
    return Found(_preprocess(fields, mean=mean, std=std, **shape), theirs.origin, note)


def _processor(folder: Path, fields: Fields) -> str | None:
    """Returns the kind of transformers' processor (CLIP, ViT, ...); None when no file has it."""
    for name in ("image_processor_type", "feature_extractor_type"):
        if name in fields:
            named = rf"({'|'.join(_PROCESSORS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)"
            kind = re.fullmatch(named, str(fields.value(name)))
            if kind is None:
                raise fields.refusal(name, f"only processors of {', '.join(_PROCESSORS)} can be read")
            return kind[1]
    model = read_json(folder / TIMM).get("model_type") if (folder / TIMM).is_file() else None
    return next((kind for kind in _PROCESSORS if kind.lower() == model), None)


def _hf_size(fields: Fields) -> tuple[int, Mode, int]:
    """Returns the side after the resize, the mode, and the side of the final picture."""
    size, crop = fields.value("size"), fields.boolean("do_center_crop")
    sides = {name for name, side in size.items() if side is not None} if isinstance(size, dict) else set()
    if isinstance(size, dict) and sides not in ({"shortest_edge"}, {"height", "width"}):
        raise fields.refusal("size", "it must be a number of pixels, shortest_edge, or height and width")
    side = fields.object("size").integer("shortest_edge") if sides == {"shortest_edge"} else fields.square("size")
    shortest = sides == {"shortest_edge"} or (isinstance(size, int) and not fields.boolean("default_to_square"))
    if shortest and not crop:
        raise fields.refusal("do_center_crop", "the model needs square pictures, which need a crop")
    return side, "shortest" if shortest else "squash", fields.square("crop_size") if crop else side


def _folded(fields: Fields) -> tuple[Channels, Channels]:
    """Returns mean and std of values in 0..1, for any rescale factor of the file."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if fields.boolean("do_normalize", True):
        mean, std = fields.numbers("image_mean", length=3), fields.numbers("image_std", length=3, above=0)
    factor = fields.number("rescale_factor", 1 / _BYTE, above=0) if fields.boolean("do_rescale", True) else 1.0
    first, second = (tuple(value / (_BYTE * factor) for value in values) for values in (mean, std))
    return first, second  # type: ignore[return-value]


def _read_open_clip(folder: Path, size: int) -> Found | None:
    """Reads open_clip's `preprocess_cfg`."""
    file = folder / OPEN_CLIP
    if not file.is_file() or (theirs := read_json(file).get("preprocess_cfg")) is None:
        return None
    fields, default = Fields(theirs, f"{file}: preprocess_cfg").with_defaults(), Preprocess()
    note = ""
    if (theirs_size := fields.square("size", size)) != size:  # open_clip, too, takes the model's
        note = f"preprocessing: {file} is for pictures of {theirs_size} pixels; the size of the model, {size}, is used"
    fields.fixed("mode", "RGB")
    # open_clip evaluates with bicubic where it trains with random filters
    filters = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
    pre = _preprocess(
        fields,
        size=size,
        mean=fields.numbers("mean", default.mean, length=3),
        std=fields.numbers("std", default.std, length=3, above=0),
        interpolation=fields.choice("interpolation", filters, "bicubic"),
        resize=size,
        background="last",
        mode=fields.choice("resize_mode", {mode: mode for mode in get_args(Mode)}, "shortest"),
        fill=fields.integer("fill_color", 0, least=0, most=_BYTE),
    )
    fields.done("what the model sees")
    return Found(pre, OPEN_CLIP, note)


def _read_timm(folder: Path, size: int) -> Found | None:
    """Reads timm's `pretrained_cfg`; old files have its fields at the top. Missing fields have timm's defaults."""
    file = folder / TIMM
    if not file.is_file() or "architecture" not in (whole := read_json(file)):
        return None
    old = "pretrained_cfg" not in whole
    part, where = (whole, str(file)) if old else (whole["pretrained_cfg"], f"{file}: pretrained_cfg")
    fields = Fields(part, where).with_defaults()
    if not any(name in fields for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")):
        return None
    if "crop_border_pixels" in fields:
        raise fields.refusal("crop_border_pixels", "this processing is not supported")
    note, seen = "", fields.integers("input_size", None, length=3)  # channels, height, width
    if seen and seen[1:] != (size, size):
        note = f"preprocessing: {file} is for pictures of {seen[1]} x {seen[2]}; the size of the model, {size}, is used"
    pre = _preprocess(
        fields,
        size=size,
        mean=fields.numbers("mean", IMAGENET_MEAN, length=3),
        std=fields.numbers("std", IMAGENET_STD, length=3, above=0),
        interpolation=fields.choice("interpolation", {name: name for name in FILTERS}, "bicubic"),
        mode=fields.choice("crop_mode", {"center": "shortest", "squash": "squash"}, "center"),
    )
    return Found(pre.cropped(fields.number("crop_pct", 0.875, above=0, most=1)), TIMM, note)


def _write_hf(pre: Preprocess, folder: Path) -> None:
    if pre.mode == "longest":
        pads = "this model's preprocessing pads (mode 'longest')"
        raise InputError(f"transformers' image processors of CLIP and ViT do not pad; {pads}")
    side, crop = pre.resize or pre.size, {"height": pre.size, "width": pre.size}
    flags = dict(do_resize=True, do_rescale=True, rescale_factor=1 / _BYTE, do_normalize=True, do_convert_rgb=True)
    about: dict[str, Any] = flags | dict(resample=int(pre.filter), image_mean=list(pre.mean), image_std=list(pre.std))
    if pre.mode == "shortest":
        about |= dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": side})
        about |= dict(do_center_crop=True, crop_size=crop)
    elif side == pre.size:
        about |= dict(image_processor_type="ViTImageProcessor", size=crop)
    else:
        size = {"height": side, "width": side}
        about |= dict(image_processor_type="DeiTImageProcessor", size=size, do_center_crop=True, crop_size=crop)
    write_json(folder / PREPROCESSOR, about)


def _write_open_clip(pre: Preprocess, folder: Path) -> None:
    if pre.resize not in (None, pre.size):
        ours = f"this model's resizes to {pre.resize} and crops {pre.size}"
        raise InputError(f"open_clip resizes to the size of the crop; {ours}")
    if pre.interpolation not in ("bicubic", "bilinear"):
        theirs = "bicubic or bilinear interpolation"
        raise InputError(f"open_clip resizes by {theirs}, this model's preprocessing by {pre.interpolation}")
    about: dict[str, Any] = dict(mean=list(pre.mean), std=list(pre.std))
    about |= dict(interpolation=pre.interpolation, resize_mode=pre.mode)
    about |= dict(fill_color=pre.fill) if pre.mode == "longest" else {}
    write_json(folder / OPEN_CLIP, read_json(folder / OPEN_CLIP) | dict(preprocess_cfg=about))


def _write_timm(pre: Preprocess, folder: Path) -> None:
    if pre.mode == "longest":
        raise InputError("timm pads with the mean colour only; this model's preprocessing pads (mode 'longest')")
    side = pre.resize or pre.size
    shares = (pre.size / side, pre.size / (side + 0.5))  # the first, unless floor(size / share) is one too small
    share = next(share for share in shares if replace(pre, resize=None).cropped(share).resize == side)
    theirs = read_json(folder / TIMM)
    about: dict[str, Any] = dict(mean=list(pre.mean), std=list(pre.std))
    about |= dict(interpolation=pre.interpolation, crop_pct=share)
    about |= dict(crop_mode="squash" if pre.mode == "squash" else "center")
    write_json(folder / TIMM, theirs | dict(pretrained_cfg=theirs.get("pretrained_cfg", {}) | about))


_Reader = Callable[[Path, int], Found | None]
_READERS: dict[str, _Reader] = {"hf": _read_hf, "open_clip": _read_open_clip, "timm": _read_timm}
_Writer = Callable[[Preprocess, Path], None]
_WRITERS: dict[str, _Writer] = {"hf": _write_hf, "flax": _write_hf}
_WRITERS |= {"open_clip": _write_open_clip, "timm": _write_timm}
