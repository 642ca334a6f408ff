"""Sharded Zarr arrays: row i of a store is image i of its split."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from cdul_steps.data.classes import check_choice
from cdul_steps.data.files import SCHEMA_VERSION, check_version, read_json, replacing
from cdul_steps.errors import UserError, first_line

CHUNK_BYTES = 1 << 20
# Less than 32 MiB: for larger blocks glibc gets new memory from the system every time, page by
# page, which takes as long as reading them.
BLOCK_BYTES = 24 << 20


def _create(
    path: Path,
    shape: tuple[int, int, int],
    shard_size: int,
    dtype: str,
    attributes: dict[str, Any],
    write_empty: bool = False,
) -> zarr.Array:
    row_bytes = shape[1] * shape[2] * np.dtype(dtype).itemsize
    # A shard contains a whole number of inner chunks of about CHUNK_BYTES.
    pieces = min(shard_size, max(1, shard_size * row_bytes // CHUNK_BYTES))
    while shard_size % pieces:
        pieces -= 1
    return zarr.create_array(
        store=path,
        shape=shape,
        dtype=dtype,
        chunks=(shard_size // pieces, *shape[1:]),
        shards=(shard_size, *shape[1:]),
        # Rows that were never written cannot be mistaken for data.
        fill_value=float("nan"),
        # Scores hardly compress; the checksum makes reading a corrupt shard an error.
        compressors=Crc32cCodec(),
        attributes={"schema_version": SCHEMA_VERSION, **attributes},
        dimension_names=("image", "view", "value"),
        config={"write_empty_chunks": write_empty},
        zarr_format=3,
    )


STORE = ("zarr.json", "c/*")
"""The files of a store."""


def check_store(path: Path, kind: str | None) -> None:
    """Raise UserError if `path` is a Zarr store of another kind, which must not be overwritten."""
    if (path / "zarr.json").exists():
        found = read_json(path / "zarr.json").get("attributes", {}).get("kind")
        if found != kind:
            raise UserError(
                f"{path}: is a Zarr store of {found or 'something else'!r}, not of {kind!r}; give "
                "another name"
            )


def write_metadata(
    path: Path, shape: tuple[int, int, int], shard_size: int, dtype: str, attributes: dict[str, Any]
) -> None:
    """Write the `zarr.json` of a store at `path` without touching its shards.

    Raises UserError if `path` is a store of another kind, or contains other files.
    """
    check_store(path, attributes.get("kind"))
    with replacing(path / "zarr.json") as part:
        scratch = part.parent / "store"
        _create(scratch, shape, shard_size, dtype, attributes)
        (scratch / "zarr.json").replace(part)


def shard_file(path: Path, shard: int) -> Path:
    """The object that contains shard `shard`."""
    return path / "c" / str(shard) / "0" / "0"


def write_shard(path: Path, shard: int, rows: np.ndarray, shard_size: int) -> None:
    """Write one shard of a store atomically: rows (n <= shard_size, V, D).

    `rows` are float16 or float32; the shard is NaN beyond them.

    No `zarr.json` is needed: the object does not depend on the store's length, so jobs of
    different shards never write the same file.
    """
    shape = (shard_size, *rows.shape[1:])
    with replacing(shard_file(path, shard)) as part:
        scratch = part.parent / "store"
        # Zarr does not write an object that is all NaN, but a job's output must exist.
        empty = bool(np.isnan(rows).all())
        store = _create(scratch, shape, shard_size, str(rows.dtype), {}, write_empty=empty)
        if empty:
            store[:] = np.nan
        else:
            store[: len(rows)] = rows
        shard_file(scratch, 0).replace(part)


def open_store(path: Path) -> zarr.Array:
    """Open a store for reading.

    Raises UserError if it is missing, has another schema version, or is not 3-D floats.
    """
    try:
        # Not format 2, whose codecs include pickle, which can run code.
        array = zarr.open_array(path, mode="r", zarr_format=3)
        attributes = dict(**array.metadata.attributes)  # a mapping, whatever zarr.json has
    except Exception as error:  # an arbitrary zarr.json can make the library raise anything
        raise UserError(f"{path}: not a Zarr array (of format 3)") from error
    check_version(path, attributes)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise UserError(
            f"{path}: contains {array.dtype} of shape {array.shape}, expected floats (images, "
            "views, values)"
        )
    return array


def shard_rows(array: zarr.Array) -> int:
    """Images per shard of the store (or per chunk, if it is not sharded)."""
    return (array.shards or array.chunks)[0]


def open_similarity(
    path: Path, tau: float | None, hint: str = "give --tau"
) -> tuple[zarr.Array, list[str], float]:
    """Open a similarity store: `(array (N, 1+S, C+M), class names, logit scale)`.

    The C classes are followed by M context names; see `context_of`. The scale is needed, and read,
    only if no `tau` is given; otherwise it is NaN. Raises UserError if an attribute is missing or
    does not fit the array, or `tau` is not above 0; if the scale is at fault, the message ends with
    `hint`.
    """
    if tau is not None and not tau > 0:
        raise UserError(f"tau is {tau:g}; it must be above 0")
    array = open_store(path)
    classes = array.attrs.get("classes")
    context = context_of(array)
    named = [*classes, *context] if isinstance(classes, list) else []
    names = {name for name in named if isinstance(name, str)}
    if (
        not isinstance(classes, list)
        or not classes
        or not array.shape[2] == len(names) == len(named)
    ):
        raise UserError(
            f"{path}: its attribute 'classes' must name its {array.shape[2] - len(context)} "
            "classes in order"
        )
    check_choice(classes, context, path)
    scale = array.attrs.get("logit_scale")
    if tau is not None:
        scale = math.nan
    elif scale is None:
        raise UserError(f"{path}: has no attribute 'logit_scale'; {hint}")
    if not isinstance(scale, int | float) or not (tau or 0 < scale < math.inf):
        raise UserError(f"{path}: its attribute 'logit_scale' is {scale!r}; {hint}")
    if array.shape[1] < 2:
        raise UserError(f"{path}: has no snippets, only the whole image")
    return array, classes, float(scale)


def context_of(similarity: zarr.Array) -> list[str]:
    """Names of the context columns after the classes of a similarity store."""
    context = similarity.attrs.get("context", [])
    return context if isinstance(context, list) else []


def read_logit_bias(values: Mapping[str, Any], source: Path) -> float | None:
    """The model's `logit_bias` in a store's attributes or a table's facts; None if it has none.

    Raises UserError, naming the `source`, if it is not a finite number.
    """
    bias = values.get("logit_bias")
    if bias is not None and not (isinstance(bias, int | float) and math.isfinite(bias)):
        raise UserError(f"{source}: its logit_bias is {bias!r}, not a number; make it again")
    return bias


def _block_rows(array: zarr.Array) -> int:
    """Images to read at once: whole shards if they fit, so that none is read twice."""
    row_bytes = array.shape[1] * array.shape[2] * array.dtype.itemsize
    fit = max(1, BLOCK_BYTES // row_bytes)
    size = shard_rows(array)
    return fit // size * size or fit


def read_blocks(path: Path, array: zarr.Array) -> Iterator[tuple[int, np.ndarray]]:
    """Read a store in order: `(first row, rows (n, V, D))`, in blocks of about BLOCK_BYTES.

    A missing shard reads as NaN. Raises UserError with the name of a shard that cannot be read.
    """
    block = _block_rows(array)

    def read(first: int) -> np.ndarray:
        try:
            return _read_rows(path, array, first, block)
        except MemoryError:
            raise
        except Exception as error:
            shard = _torn_shard(path, array, first, block)
            raise UserError(
                f"{shard_file(path, shard)}: corrupt shard, or one from another run; "
                f"delete it and run again ({first_line(error)})"
            ) from error

    # Read one block ahead while the caller processes the previous one.
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for first in range(0, array.shape[0], block):
            rows = ahead.result()
            if first + block < array.shape[0]:
                ahead = reader.submit(read, first + block)
            yield first, rows


def _read_rows(path: Path, array: zarr.Array, first: int, count: int) -> np.ndarray:
    size = shard_rows(array)
    last = min(first + count, array.shape[0])
    for shard in range(first // size, -(-last // size)):
        # Zarr treats an empty object as one that was never written.
        object_ = shard_file(path, shard)
        if object_.is_file() and not object_.stat().st_size:
            raise ValueError("the file is empty")
    return np.asarray(array[first:last])


def _torn_shard(path: Path, array: zarr.Array, first: int, block: int) -> int:
    """The first shard of a block that cannot be read."""
    size = shard_rows(array)
    for start in range(first, min(first + block, array.shape[0]), size):
        try:
            _read_rows(path, array, start, min(size, block))
        except Exception:
            return start // size
    return first // size


@contextmanager
def new_store(
    path: Path, shape: tuple[int, int, int], shard_size: int, dtype: str, attributes: dict[str, Any]
) -> Iterator[zarr.Array]:
    """Yield an empty store to fill in row order; it is moved to `path` if the block succeeds.

    Raises UserError if `path` is a store of another kind, or a folder with other contents.
    """
    check_store(path, attributes.get("kind"))
    with replacing(path, STORE) as part:
        yield _create(part, shape, shard_size, dtype, attributes)


def on_disk(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """A float32 array of zeros in a nameless file in `folder`, which is gone with the array.

    The system keeps of it in memory what is in use and fits. Raises OSError if there is no space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Without space, writing into the array would end the process with a signal.
            os.posix_fallocate(file.fileno(), 0, max(1, 4 * math.prod(shape)))
            return np.asarray(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error
