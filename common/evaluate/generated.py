"""Scores generated pictures against a reference batch of the ADM suite, with the features of one Inception for both."""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.errors import InputError, remark
from heirloom.common.evaluate.extractor import Extractor
from heirloom.common.evaluate.features import embedder
from heirloom.common.evaluate.fid import Gaussian, Statistics, frechet_distance, inception_score, kid, precision_recall
from heirloom.common.evaluate.inception import ADM, POOL, SPATIAL
from heirloom.common.mesh import replicated
from heirloom.common.reading import parsing

BATCH = 64
LEAST = 10  # pictures that a score needs, generated and reference
# Errors of a damaged archive or array: of its compressed data, its names and flags (encrypted, another compression).
_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Reference:
    """A reference to compare with: statistics of the "adm" features of the whole set, pictures, or both.

    where: its name, for messages. pool, spatial: the statistics, None where the file has none. images: number of
    pictures. read(rows): iterates over the pictures, uint8 [up to rows, height, width, 3]. size: their height and
    width, where a file has them.
    """

    where: str
    pool: Gaussian | None
    spatial: Gaussian | None
    images: int
    read: Callable[[int], Iterator[np.ndarray]]
    size: tuple[int, ...] = ()


def read_reference(path: Path) -> Reference:
    """Opens a reference `.npz`: statistics `mu`, `sigma`, `mu_s`, `sigma_s`, or pictures `arr_0`, left on disk.

    Raises InputError when it has neither, or when one has a wrong form.
    """
    if path.suffix == ".npy":
        needed = "a .npz with pictures `arr_0`: np.savez('reference.npz', arr_0=pictures)"
        raise InputError(f"{path}: a reference is not a .npy but {needed}")
    keys = _keys(path)
    if not keys & {"mu", "arr_0"}:
        held = ", ".join(sorted(keys)) or "nothing"
        raise InputError(f"{path}: has {held}; a reference batch needs pictures `arr_0` or statistics `mu` and `sigma`")
    try:
        with np.load(path) as arrays:
            pool = _gaussian(arrays, "mu", "sigma", POOL, path)
            spatial = _gaussian(arrays, "mu_s", "sigma_s", SPATIAL, path)
    except _BROKEN as error:
        raise InputError(f"{path}: its statistics cannot be read ({error}); fetch it again") from error
    images, *size = _shape(path)[:3] if "arr_0" in keys else (0,)
    read = partial(read_images, path)
    return Reference(str(path), pool=pool, spatial=spatial, images=images, read=read, size=tuple(size))


def read_images(path: Path, rows: int = BATCH) -> Iterator[np.ndarray]:
    """Yields the pictures `arr_0` of a `.npz`, uint8 [rows, height, width, 3] at a time: a file may have gigabytes.

    Raises InputError when there are no pictures, pictures of another type, or fewer than the header says.
    """
    shape = _shape(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            for start in range(0, shape[0], rows):
                batch = (min(rows, shape[0] - start), *shape[1:])
                yield np.frombuffer(file.read(int(np.prod(batch))), np.uint8).reshape(batch)
    except _BROKEN as error:
        raise InputError(f"{path}: its pictures are cut short ({error}); fetch it again") from error


@dataclass(frozen=True)
class Measured:
    """Features of pictures, f32: pooled [pictures, 2048], logits [pictures, class]; pool, spatial: their moments."""

    pooled: np.ndarray
    logits: np.ndarray
    pool: Statistics
    spatial: Statistics


def measurer(extractor: Extractor, mesh: Mesh, size: int = BATCH) -> Callable[[Iterable[np.ndarray]], Measured]:
    """Makes a function of batches uint8 [any, height, width, 3]: compiled per size, `size` rows over the mesh.

    The function raises InputError for batches of another type or rank, and for features that are not finite.
    """
    params = jax.device_put(dict(extractor.params), replicated(mesh))
    embed = embedder(lambda params, x: jnp.concatenate(extractor.model.apply(params, x), -1), mesh, size)

    def measure(batches: Iterable[np.ndarray]) -> Measured:
        pooled = [np.zeros((0, POOL), np.float32)]
        logits = [np.zeros((0, extractor.cfg.classes), np.float32)]
        pool, spatial = Statistics(POOL), Statistics(SPATIAL)
        for batch in batches:
            if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
                found = f"{batch.dtype} {list(batch.shape)}"
                raise InputError(f"pictures are {found}, and must be uint8 [batch, height, width, 3]")
            for start in range(0, len(batch), size):
                features = np.split(embed(params, batch[start : start + size]), (POOL, POOL + SPATIAL), axis=1)
                if not all(np.isfinite(x).all() for x in features):
                    damaged = "the Inception weights are damaged"
                    raise InputError(f"features of pictures are not finite (NaN or infinity): {damaged}")
                pool.add(features[0])
                spatial.add(features[1])
                pooled.append(features[0])
                logits.append(features[2])
        return Measured(pooled=np.concatenate(pooled), logits=np.concatenate(logits), pool=pool, spatial=spatial)

    return measure


def check_reference(reference: Reference, extractor: Extractor) -> None:
    """Raises InputError for a reference that does not fit the network, or has too few pictures.

    Remarks a reference with statistics for FID and none for sFID.
    """
    protocol = extractor.cfg.protocol
    if protocol != ADM.protocol and not reference.images:
        only = f"only statistics of {ADM.protocol!r}, and the network is {protocol!r}"
        raise InputError(f"{reference.where}: has {only}; it needs pictures `arr_0`")
    if reference.size and reference.images < LEAST:
        raise InputError(f"{reference.where}: {reference.images} pictures are too few for a score: {LEAST} at least")
    if protocol == ADM.protocol and reference.pool and not reference.spatial:
        absent = "but not sFID's spatial statistics `mu_s` and `sigma_s`"
        given = f"{reference.where} has `mu` and `sigma`, which FID takes, {absent}"
        whole = "a reference batch of the ADM suite (VIRTUAL_*.npz) has both"
        if reference.images:
            remark(f"{given}: sFID is measured against its {reference.images:,} pictures instead; {whole}")
        else:
            remark(f"{given}: sFID is left out; {whole}, or give pictures `arr_0`")


def evaluate(
    batches: Iterable[np.ndarray], reference: Reference, extractor: Extractor, mesh: Mesh, size: int = BATCH
) -> list[dict[str, Any]]:
    """Scores generated pictures, in random order, against a reference; returns rows {metric, value, n, protocol}.

    batches: uint8 [any, height, width, 3]; 50,000 pictures for published numbers. The reference is read and measured
    before the first batch is taken. Statistics in a file are of "adm" and of the whole set; for another network they
    are computed from the pictures. Precision, recall and KID always need pictures. Rows that need a missing part of the
    reference are left out. Raises InputError for a reference that does not fit, or for fewer than ten pictures on a
    side.
    """
    check_reference(reference, extractor)
    measure = measurer(extractor, mesh, size)
    theirs = measure(reference.read(size)) if reference.images else None
    ours = measure(batches)
    if ours.pool.count < LEAST:
        raise InputError(f"{ours.pool.count} pictures are too few for a score, which takes {LEAST} at least")
    pool, spatial = (reference.pool, reference.spatial) if extractor.cfg.protocol == ADM.protocol else (None, None)
    if theirs:
        pool, spatial = pool or theirs.pool.gaussian(), spatial or theirs.spatial.gaussian()

    values: dict[str, float] = {}
    if pool:
        values["fid"] = _distance(ours.pool.gaussian(), pool, reference)
    if spatial:
        values["sfid"] = _distance(ours.spatial.gaussian(), spatial, reference)
    values["inception_score"] = inception_score(ours.logits)
    if theirs:
        manifolds, distance = precision_recall(theirs.pooled, ours.pooled), kid(theirs.pooled, ours.pooled)
        values |= {"precision": manifolds.precision, "recall": manifolds.recall}
        values |= {"kid": distance.mean, "kid_std": distance.std}
    shared = {"n": ours.pool.count, "protocol": extractor.cfg.protocol}
    return [{"metric": name, "value": value} | shared for name, value in values.items()]


def _distance(ours: Gaussian, theirs: Gaussian, reference: Reference) -> float:
    try:
        return frechet_distance(ours, theirs)
    except ValueError as error:
        raise InputError(f"{reference.where}: its statistics are not of pictures ({error}); fetch it again") from error


def _keys(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a .npz ({error}); give a reference batch of the ADM suite") from error


def _gaussian(arrays: Mapping[str, np.ndarray], mean: str, covariance: str, dim: int, path: Path) -> Gaussian | None:
    if not {mean, covariance} & set(arrays):
        return None
    found = []
    for key, shape in ((mean, (dim,)), (covariance, (dim, dim))):
        if key not in arrays:
            raise InputError(f"{path}: has no `{key}`, though it has other statistics; fetch it again")
        with parsing():
            value = arrays[key]
        if value.dtype.kind not in "fiu" or value.shape != shape or not np.isfinite(value).all():
            given = f"{value.dtype} {list(value.shape)}"
            raise InputError(f"{path}: `{key}` is {given}, and must be {list(shape)} finite numbers")
        found.append(np.asarray(value, np.float64))
    if (np.diagonal(found[1]) < 0).any() or not np.allclose(found[1], found[1].T, rtol=1e-4, atol=1e-6):
        needed = "a covariance (symmetric, no negative variances)"
        raise InputError(f"{path}: `{covariance}` is not {needed}; fetch it again")
    return Gaussian(*found)


def _shape(path: Path) -> tuple[int, ...]:
    """Returns the shape of `arr_0` without reading the data."""
    if "arr_0" not in _keys(path):
        raise InputError(f"{path}: has no pictures `arr_0`")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _header(file)
    except _BROKEN as error:
        raise InputError(f"{path}: `arr_0` is not an array ({error}); fetch it again") from error
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        order = " in Fortran order" if fortran else ""
        raise InputError(f"{path}: `arr_0` is {dtype} {list(shape)}{order}, not uint8 [pictures, height, width, 3]")
    return shape


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, whether the order is Fortran's, and dtype; the file is then at the start of the data."""
    version = np.lib.format.read_magic(file)
    with parsing():
        return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
