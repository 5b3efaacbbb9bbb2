"""What a method says of its models and their foreign formats, and a checkpoint that is open."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.verify import Check
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import Functional
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.plan import Source
from heirloom.common.typed import Config


@dataclass(frozen=True)
class Found:
    """A foreign checkpoint whose config is to be read.

    tensors: under clean names. folder: folder of its JSON files. about: other content of a torch file, next to the
    tensors. settings: what the user sets (`--set`), which decides where the checkpoint is doubtful.
    """

    tensors: Tensors
    folder: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def json(self, name: str) -> Fields | None:
        """Reads a JSON file next to the weights; None where it does not exist."""
        file = self.folder / name
        return Fields.load(file) if file.is_file() else None


@dataclass(frozen=True)
class Guess:
    """A setting that neither weights nor config contain, the default taken, and why. `convert --set name=VALUE`
    overrides it.

    value: None where there is no default: then the user must set it.
    """

    name: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value} is a guess: {self.why} (convert with --set {self.name}=VALUE if wrong)"


@dataclass(frozen=True)
class Read:
    """The config of a foreign checkpoint, the settings in it that are guesses, and what else it says of the model."""

    cfg: Any
    guesses: tuple[Guess, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookalike:
    """Checkpoints that cannot be read. keys: glob of tensor names that recognises them. advice: what to do with
    them.
    """

    keys: str
    advice: str


@dataclass(frozen=True)
class Format:
    """One foreign format of a model family.

    layout: the table of names, or a function of the config that returns it.
    file: name of the weights in a folder that we write; its ending selects torch, safetensors, numpy (.npz) or
    Flax (.msgpack).
    read_config(found): returns the model's config, or None when the checkpoint has another format.
    write_config(cfg, folder): writes the format's own JSON files next to the weights.
    clean: changes the keys of published files to those of the layout, after the usual wrappers are removed.
    wrapper: key of the tensors in a torch file; None: the file is the dictionary of tensors.
    complete(cfg, tensors): adds tensors that published files leave out, and removes those that belong to no part of the
    model; may raise InputError.
    """

    name: str
    layout: Layout | Callable[[Any], Layout]
    file: str
    read_config: Callable[[Found], Read | None]
    write_config: Callable[[Any, Path], None]
    clean: Callable[[str], str] = lambda key: key
    wrapper: str | None = "state_dict"
    complete: Callable[[Any, Tensors], Tensors] = lambda cfg, tensors: tensors

    def layout_of(self, cfg: Config) -> Layout:
        """Returns the layout for a model of this config."""
        return self.layout if isinstance(self.layout, Layout) else self.layout(cfg)


@dataclass(frozen=True)
class TextReader:
    """A model that reads texts for other models: `read(texts)` returns the state of every token, [text, token, width]
    f32, and which tokens count, bool [text, token].
    """

    width: int
    read: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Family:
    """A model family: its module, config type, and foreign formats.

    sidecars(donor, destination, format): writes the sidecar files (tokenizer, preprocessing) in a format.
    verify(cfg, params, file, format): compares our model with the reference that reads the foreign file.
    parameters(spec): counts by part and in total. macs(cfg, spec): multiply-accumulates of one example.
    embedded: the weights folders that come with the package, by name.
    lookalikes: similar checkpoints that cannot be read, with advice.
    outputs(cfg, params): our model's outputs on the inputs of `verify`, for the error of quantised weights; None: the
    models are not quantised.
    reader(donor, tokens): opens the model as a text encoder of other models; None: it cannot be one.
    """

    name: str
    module: Callable[..., Any]
    config: Callable[[Mapping[str, Any]], Any]
    formats: tuple[Format, ...]
    sidecars: Callable[["Donor", Path, str], None]
    verify: Callable[[Any, Mapping[str, Any], Path, str], Check]
    parameters: Callable[[Spec], dict[str, int]]
    macs: Callable[[Any, Spec], int]
    embedded: Mapping[str, Path] = field(default_factory=dict)
    lookalikes: tuple[Lookalike, ...] = ()
    outputs: Callable[[Any, Mapping[str, Any]], Sequence[np.ndarray]] | None = None
    reader: Callable[["Donor", int], TextReader] | None = None

    def format(self, name: str) -> Format:
        """Returns a format by name. Raises InputError for an unknown one."""
        for format in self.formats:
            if format.name == name:
                return format
        raise InputError(
            f"no format {name!r} for {self.name} models; there are heirloom, nnx, orbax,"
            f" {', '.join(f.name for f in self.formats)}"
        )


@dataclass(frozen=True)
class Donor:
    """A checkpoint opened lazily: its parameters are views of memory-mapped files until they are read.

    format: "heirloom" for a folder of ours. path: the path that was given. file: the weights in it. guesses: settings
    of `cfg` that the checkpoint does not contain. quantized: "int8" where kernels are, else empty. known: what a
    foreign checkpoint says of the model that is not part of `cfg`.
    """

    family: Family
    cfg: Any
    model: Functional
    source: Source
    format: str
    path: Path
    file: Path
    guesses: tuple[Guess, ...] = ()
    quantized: str = ""
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the sidecar files, if there are any."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Outline:
    """A checkpoint without weights: enough to compile a step with it as teacher."""

    family: Family
    cfg: Any
    model: Functional
