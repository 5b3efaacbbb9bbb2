"""Reads foreign JSON: each field is read with its type, fixed to one value, or known to change nothing. Any other field
is refused.

    fields = Fields.load(folder / "config.json")
    width = fields.integer("hidden_size", 768)
    activation = fields.choice("hidden_act", {"gelu": "gelu", "quick_gelu": "quick_gelu"}, "gelu")
    fields.fixed("qkv_bias", True)                   # refused when it says anything else
    fields.skip("transformers_version", "id2label")  # changes nothing that the model computes
    fields.done()                                    # refuses a field that no call has named

A field that is null counts as given; for a library that takes its default instead, use `fields.with_defaults(...)`.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from heirloom.common.errors import FLOAT32_MAX, InputError, nearest
from heirloom.common.files import read_json

T = TypeVar("T")
D = TypeVar("D")  # the type of a default
_REQUIRED: Any = object()
# Fields that any config of transformers may have: text generation, training, names. None of them changes a forward
# pass, except that CLIP's text tower pools at eos_token_id, which its reader reads.
TRANSFORMERS = (
    "_name_or_path", "_commit_hash", "_attn_implementation*", "attn_implementation", "transformers_version",
    "architectures",
    "torch_dtype", "dtype", "return_dict", "return_dict_in_generate", "output_*", "torchscript", "use_bfloat16",
    "tf_legacy_loss",
    "xla_device", "use_cache", "gradient_checkpointing", "chunk_size_feed_forward", "tie_encoder_decoder",
    "tie_word_embeddings",
    "cross_attention_hidden_size", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "finetuning_task",
    "id2label", "label2id", "num_labels", "problem_type", "tokenizer_class", "prefix", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "task_specific_params", "initializer_*", "*dropout*", "layerdrop", "loss_type", "_*",
)  # fmt: skip
# Fields that diffusers' EMAModel adds to the config of an average.
AVERAGE = (
    "decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup",
)  # fmt: skip
LARGEST = 2**24  # of any size in a config; a larger one is a mistake and would fill the memory


class Fields:
    """A JSON object whose fields are read one by one. Every method raises InputError, naming file and field."""

    def __init__(self, values: Any, where: str, absent: str = "take the file that belongs to the weights"):
        """values: the JSON object. where: the file, and the path in it. absent: advice of the error for a missing
        required field.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where} is {_shown(values)}, not an object")
        self.where, self._absent = where, absent
        self._values, self._known = values, set[str]()

    @classmethod
    def load(cls, file: Path) -> "Fields":
        """Reads a JSON file."""
        return cls(read_json(file), str(file))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def with_defaults(self, defaults: Mapping[str, Any] | None = None, absent: str = "") -> "Fields":
        """Returns the object for a library where null counts as missing, with these defaults for null or missing
        fields.
        """
        given = {name: value for name, value in self._values.items() if value is not None}
        return Fields({**(defaults or {}), **given}, self.where, absent or self._absent)

    def refusal(self, name: str, why: str) -> InputError:
        """Returns the error for a field whose value the caller checks itself."""
        return InputError(f"{self.where}: {name} is {_shown(self._values.get(name))}; {why}")

    def _take(self, name: str, default: Any, kind: type | tuple[type, ...], needed: str) -> Any:
        self._known.add(name)
        value = self._values.get(name, default)
        if value is _REQUIRED:
            raise InputError(f"{self.where}: {name!r} is missing; {self._absent}")
        if name not in self._values or (value is None and default is None):
            return default
        if not isinstance(value, kind) or (
            isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,))
        ):
            raise InputError(f"{self.where}: {name} is {_shown(value)}, and must be {needed}")
        return value

    def integer(self, name: str, default: D = _REQUIRED, *, least: int = 1, most: int = LARGEST) -> int | D:
        """Reads a whole number from `least` to `most`; `default` where the field is absent."""
        value = self._take(name, default, int, "a whole number")
        if name in self._values and value is not None and not least <= value <= most:
            raise InputError(f"{self.where}: {name} is {value}, and must be from {least} to {most}")
        return value

    def number(
        self, name: str, default: D = _REQUIRED, *, least: float = 0.0, above: float = -inf, most: float = inf
    ) -> float | D:
        """Reads a finite number, at least `least`, above `above` and at most `most`, as a float."""
        value = self._take(name, default, (int, float), "a number")
        if value is None:
            return default
        if not (_finite(value) and least <= value <= most and value > above):
            bound = (f"above {above:g}" if above >= least else f"of at least {least:g}") + (
                f" and at most {most:g}" if most < inf else ""
            )
            raise InputError(f"{self.where}: {name} is {_shown(value)}, and must be a finite number {bound}")
        return float(value)

    def numbers(self, name: str, default: D = _REQUIRED, *, length: int, above: float = -inf) -> tuple[float, ...] | D:
        """Reads `length` finite numbers above `above` as a tuple of floats; a file may give one number for all."""
        value = self._take(name, default, (list, tuple, int, float), f"1 or {length} finite numbers")
        if value is None:
            return default
        given = value if isinstance(value, list | tuple) else [value]
        if len(given) not in (1, length) or not all(_finite(v) and v > above for v in given):
            bound = "" if above == -inf else f" above {above:g}"
            raise InputError(
                f"{self.where}: {name} is {_shown(value)}, and must be 1 or {length} finite numbers{bound}"
            )
        return tuple(float(v) for v in (given if len(given) == length else [*given] * length))

    def boolean(self, name: str, default: D = _REQUIRED) -> bool | D:
        """Reads true or false."""
        return self._take(name, default, bool, "true or false")

    def text(self, name: str, default: D = _REQUIRED) -> str | D:
        """Reads a string."""
        return self._take(name, default, str, "a string")

    def choice(self, name: str, known: Mapping[str, T], default: str = _REQUIRED, *, near: bool = True) -> T:
        """Looks up the field's string in `known`. near: an error may name the nearest of them."""
        value = self._take(name, default, str, "a string")
        if value not in known:
            hint = nearest(str(value), known) if near else ""
            raise InputError(f"{self.where}: {name} is {value!r}{hint}; only {', '.join(map(repr, known))} can be read")
        return known[value]

    def integers(self, name: str, default: D = _REQUIRED, *, length: int | None = None) -> tuple[int, ...] | D:
        """Reads a list of positive whole numbers as a tuple."""
        needed = f"a list of {'' if length is None else f'{length} '}positive whole numbers"
        value = self._take(name, default, (list, tuple), needed)
        if value is None:
            return default
        if not all(
            isinstance(v, int) and not isinstance(v, bool) and 0 < v <= LARGEST for v in value
        ) or length not in (None, len(value)):
            raise InputError(f"{self.where}: {name} is {_shown(value)}, and must be {needed}")
        return tuple(value)

    def square(self, name: str, default: D = _REQUIRED) -> int | D:
        """Reads one whole number, which may be written as [n, n] or as height and width."""
        value = self._values.get(name)
        if isinstance(value, (list, tuple)):
            height, width = self.integers(name, length=2)
        elif isinstance(value, Mapping):
            sides = self.object(name).with_defaults()
            height, width = sides.integer("height"), sides.integer("width")
            sides.done()
        else:
            return self.integer(name, default)
        if height != width:
            raise self.refusal(name, "only squares can be read")
        return height

    def sides(self, name: str, default: tuple[int, int] = _REQUIRED) -> tuple[int, int]:
        """Reads height and width, which may be one whole number for both."""
        if isinstance(self._values.get(name), (list, tuple)):
            height, width = self.integers(name, length=2)
            return height, width
        side = self.integer(name, None) if name in self._values or default is _REQUIRED else None
        return default if side is None else (side, side)

    def object(self, name: str) -> "Fields":
        """Reads a nested object, an empty one where the field is absent or null."""
        self._known.add(name)
        return Fields({} if self._values.get(name) is None else self._values[name], f"{self.where}: {name}")

    def value(self, name: str, default: Any = None) -> Any:
        """Returns the field unchecked, for a caller that checks it itself."""
        self._known.add(name)
        return self._values.get(name, default)

    def fixed(self, name: str, *values: Any, feature: str = "") -> None:
        """Refuses the field when it is given and has none of these values. feature: what another value means, for the
        message.
        """
        self._known.add(name)
        if name in self._values and not any(_same(self._values[name], value) for value in values):
            needed, meaning = " or ".join(_shown(value) for value in values), f" ({feature})" if feature else ""
            raise InputError(
                f"{self.where}: {name} is {_shown(self._values[name])}{meaning}; only models where it is {needed} can"
                " be read"
            )

    def agree(self, name: str, said: T, actual: T, advice: str = "is it the config of another model?") -> None:
        """Refuses a size that differs from that of the weights: then the config belongs to another model."""
        if said != actual:
            raise InputError(f"{self.where}: {name} is {said}, and the weights have {actual}; {advice}")

    def skip(self, *names: str) -> None:
        """Accepts fields, or globs of fields, that do not change what the model computes."""
        self._known |= {field for field in self._values for name in names if fnmatchcase(field, name)}

    def transformers(self) -> None:
        """Accepts the fields that any config of transformers may have; refuses those that would change the forward
        pass.
        """
        self.fixed("pruned_heads", {}, None)
        self.fixed("is_decoder", False)
        self.fixed("is_encoder_decoder", False)
        self.fixed("add_cross_attention", False)
        self.skip(*TRANSFORMERS)

    def done(self, changes: str = "what the model computes") -> None:
        """Refuses a field that no call has named: it could change what the model computes."""
        if unknown := sorted(self._values.keys() - self._known):
            field = unknown[0]
            advice = f"remove it if it does not{nearest(field, self._known - self._values.keys())}"
            if field == "quantization_config":
                advice = "take the checkpoint that was quantised, in bfloat16 or float32"
            raise InputError(
                f"{self.where}: the field {field!r} ({_shown(self._values[field])}) is not known here and may change"
                f" {changes}; {advice}"
            )


def _finite(value: Any) -> bool:
    """Returns whether a value is a number, and not too large for float32, in which a model computes with it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _same(a: Any, b: Any) -> bool:
    """Returns whether two values are equal and both or neither are booleans: 1 does not equal true."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)  # a JSON list
    return text if len(text) <= 60 else f"{text[:57]}..."
