"""TensorFlow Datasets."""

from typing import Any

import numpy as np

from heirloom.common.data.sources.record import Record, SourceConfig, captions, require_columns, value
from heirloom.common.errors import InputError, nearest
from heirloom.common.reading import retried


class TfdsSource:
    """A data set that TensorFlow Datasets prepared in a random-access format. Reading it does not need TensorFlow.

    When `text` is a class feature, the caption is the name of the class. A class feature `label` is always in the
    record, as a number.
    """

    def __init__(self, name: str, cfg: SourceConfig):
        try:
            import tensorflow_datasets as tfds  # an optional and heavy package
        except ImportError as error:
            needed = "needs tensorflow-datasets; pip install tensorflow-datasets array-record"
            raise InputError(f"reading tfds: data {needed}") from error
        self._name, self._cfg = name, cfg
        name, _, folder = name.partition("@")
        prepare = f"prepare it with: tfds build {name.partition(':')[0]} --file_format=array_record"
        try:
            builder = tfds.builder(name, data_dir=folder or None)
        except (ValueError, AttributeError) as error:
            what = f"{str(error).splitlines()[0]} Give its folder with @DIR, or {prepare}"
            raise InputError(f"tfds:{name}: {what}") from error
        splits = list(builder.info.splits)
        if not splits:
            raise InputError(f"tfds:{name} is not prepared{f' in {folder}' if folder else ''}; {prepare}")
        if cfg.split.partition("[")[0] not in splits:
            near = f"{nearest(cfg.split, splits)} (it has {', '.join(splits)})"
            raise InputError(f"tfds:{name} has no split {cfg.split!r}{near}")
        features = builder.info.features
        require_columns(cfg, list(features), f"tfds:{name}")
        labels = ((n, f.names) for n, f in features.items() if isinstance(f, tfds.features.ClassLabel))
        self.class_names = {n: tuple(names) for n, names in labels if names}
        self.classes = self.class_names.get("label", ())
        try:
            decoders = {cfg.image: tfds.decode.SkipDecoding()} if cfg.image else None
            self._records = builder.as_data_source(split=cfg.split, decoders=decoders)
        except NotImplementedError as error:
            stored = builder.info.file_format.value
            raise InputError(f"tfds:{name} is stored as {stored}, without random access; {prepare}") from error

    def __reduce__(self) -> Any:
        return TfdsSource, (self._name, self._cfg)  # opens it again: its readers hold file handles

    def __len__(self) -> int:
        return len(self._records)

    def key(self, index: int) -> str:
        """Returns the name of the data, the split and the number of the record."""
        return f"tfds:{self._name} {self._cfg.split} {index}"

    def __getitem__(self, index: int) -> Record:
        cfg, key = self._cfg, self.key(index)
        try:
            values = retried(lambda: self._records[index], key)
        except InputError:
            raise
        except Exception as error:  # its readers and decoders raise many types for damaged files
            raise InputError(f"{key} is not readable: {error}") from error
        record = Record(key=key) | {c: value(values[c], key, c) for c in cfg.columns}
        if "label" in self.class_names:
            record["label"] = np.int32(values["label"])
        if cfg.image:
            record["image"] = values[cfg.image]
        if cfg.text in self.class_names:
            record["text"] = self.class_names[cfg.text][int(values[cfg.text])]
        elif cfg.text:
            try:
                text = _decoded(values[cfg.text])
            except UnicodeDecodeError as error:
                raise InputError(f"{key} is not UTF-8 text: {error}") from error
            record["text"] = captions(text, key)
        return record


def _decoded(text: Any) -> Any:
    """Decodes bytes, and arrays of bytes, of TFDS; other values are unchanged."""
    if isinstance(text, bytes):
        return text.decode()
    if isinstance(text, np.ndarray | list):
        return [_decoded(part) for part in (text.tolist() if isinstance(text, np.ndarray) else text)]
    return text
