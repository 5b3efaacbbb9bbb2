"""Removes what training scripts add to the names of tensors."""

import re

from heirloom.common.checkpoint.unwrap import AVERAGE, TRAINING, Weights
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError

_METRICS = re.compile(r"(^|_)(acc\d*|accuracy|auroc|f1|confmat|metrics?)(_|$)", re.IGNORECASE)  # torchmetrics' states
# Parts of names that torch's wrappers add, and attributes of trainers that hold a model.
_INNER = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER = ("model", "net", "network", "ema", "model_ema", "ema_model", "averaged_model")
_COUNTERS = ("n_averaged", "initted", "step")  # of torch's AveragedModel, and of ema_pytorch


def clean_names(found: Weights) -> Weights:
    """Removes the parts that data parallelism, compilation, Lightning and averaging add to the names of tensors.

    Of a model and its average under two names it keeps the average; the loss and the metrics next to a model are left
    out. Raises InputError where two tensors would get the same name.
    """
    notes, seen = list(found.notes), set()
    tensors, outside = Tensors(), Tensors()
    for key, value in found.tensors.items():
        name = ".".join(part for part in key.split(".") if part not in _INNER)
        seen |= {f"{part}." for part in key.split(".") if part in _INNER}
        if name in tensors:
            raise InputError(
                f"two tensors have the name {name!r} without wrappers; save the model's state_dict() alone"
            )
        if name not in _COUNTERS:
            tensors[name] = value
    tensors = _with_dots(tensors)
    while (outer := _outer(tensors)) is not None:
        inside, rest, twins = _taken_apart(tensors, outer)
        averages = {name for key in (outer, *twins) if AVERAGE.search(name := key.partition(".")[0])}
        if len(averages) > 1:
            raise InputError(f"holds several averages ({', '.join(sorted(averages))}); save the one you mean alone")
        if averages and outer not in averages:
            outer = min(averages)
            inside, rest, twins = _taken_apart(tensors, outer)
        if twins:
            notes.append(f"'{outer}.*' taken, and not '{min(twins).partition('.')[0]}.*'")
        others = [key for key in rest if key not in twins]
        training = [key for key in others if _of_training(key.partition(".")[0])]
        if training:
            notes.append(f"{', '.join(training[:3])} left out, a part of the training outside '{outer}.'")
        outside = {key: rest[key] for key in others if key not in training}
        tensors = inside | outside
        seen.add(f"{outer}.")
    if seen:
        also = f"; outside of these: {', '.join(list(outside)[:3])}" if outside else ""
        notes.append(f"{', '.join(map(repr, sorted(seen)))} removed from the names of its tensors{also}")
    return Weights(tensors, found.about, tuple(notes))


def _taken_apart(tensors: Tensors, outer: str) -> tuple[Tensors, Tensors, set[str]]:
    """Returns the tensors of an attribute without its name, the others, and which of the others are the same weights
    under another name.
    """
    inside = {key.removeprefix(f"{outer}."): value for key, value in tensors.items() if key.startswith(f"{outer}.")}
    rest = {key: value for key, value in tensors.items() if not key.startswith(f"{outer}.")}
    return inside, rest, {key for key in rest if key.partition(".")[2] in inside or key in inside}


def _of_training(attribute: str) -> bool:
    return bool(TRAINING.search(attribute) or _METRICS.search(attribute))


def _with_dots(tensors: Tensors) -> Tensors:
    """Gives the tensors of LDM's average, whose names have lost their dots (`model_ema.blocks0attnqkvweight`), the
    names of the raw weights next to it.
    """
    firsts = dict.fromkeys(key.partition(".")[0] for key in tensors if "." in key)
    for average in filter(AVERAGE.search, firsts):
        inside = {key.partition(".")[2] for key in tensors if key.startswith(f"{average}.")} - {"decay", "num_updates"}
        for raw in (name for name in firsts if name != average):
            names = [key.partition(".")[2] for key in tensors if key.startswith(f"{raw}.")]
            dotted = {name.replace(".", ""): name for name in names}
            if any("." in name for name in inside) or not inside <= dotted.keys() or len(dotted) < len(names):
                continue
            renamed = {f"{average}.{name}": f"{average}.{dotted[name]}" for name in inside}
            counters = {f"{average}.decay", f"{average}.num_updates"}
            return {renamed.get(key, key): value for key, value in tensors.items() if key not in counters}
    return tensors


def without_common(found: Weights) -> Weights | None:
    """Removes the attribute that the names of all tensors begin with (`clip_model.`); None where there is no such."""
    first = {key.partition(".")[0] if "." in key else "" for key in found.tensors}
    if len(first) != 1 or not (name := first.pop()):
        return None
    tensors = {key.removeprefix(f"{name}."): value for key, value in found.tensors.items()}
    return clean_names(Weights(tensors, found.about, (*found.notes, f"{name + '.'!r} removed from all names")))


def _outer(tensors: Tensors) -> str | None:
    """Returns the attribute whose tensors to take, averages first; None when the names have no such attribute."""
    first = dict.fromkeys(key.partition(".")[0] for key in tensors if "." in key)
    return next((name for name in sorted(first, key=lambda name: not AVERAGE.search(name)) if name in _OUTER), None)
