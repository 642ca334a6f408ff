"""The location of an image: a file, part of a tar, a cell of a Parquet file, or a URL.

The text in the manifest's column `path` states which:

- `ARCHIVE.tar#OFFSET+LENGTH`: LENGTH bytes of an uncompressed tar, from byte OFFSET on;
- `FILE.parquet#COLUMN:ROWGROUP:ROW`: a cell of a column of bytes, or of structs with a field
  `bytes`; the row is counted within its row group; both count from 0;
- `https://...`, `s3://...` and others of `cdul_steps.data.remote`: a URL;
- anything else is the path of a file.

Only this text determines what is read from an archive: member names are never used as paths.
"""

import errno
import io
import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

from cdul_steps.data import remote
from cdul_steps.errors import first_line

if TYPE_CHECKING:
    import pyarrow as pa

_TAR = re.compile(r"(.+\.tar)#([0-9]{1,18})\+([0-9]{1,18})", re.DOTALL)
_PARQUET = re.compile(r"(.+\.parquet)#(.+):([0-9]{1,9}):([0-9]{1,9})", re.DOTALL)
_KEPT = 2
"""Row groups of images that a process keeps in memory: its threads read at most two at once."""


def in_tar(archive: str, offset: int, length: int) -> str:
    """The location of `length` bytes of a tar, from byte `offset` on."""
    return f"{archive}#{offset}+{length}"


def in_parquet(file: str, column: str, group: int, row: int) -> str:
    """The location of a cell of a Parquet file."""
    return f"{file}#{column}:{group}:{row}"


def file_of(place: str | PathLike[str]) -> Path:
    """The file that holds an image: its own, or the archive."""
    return Path(_file_of(str(place)))


def _file_of(place: str) -> str:
    """The same as text: a Path costs more than asking for the file's state."""
    if "#" not in place or remote.is_url(place):
        return place
    found = _TAR.fullmatch(place) or _PARQUET.fullmatch(place)
    return found[1] if found else place


def is_in_archive(place: str | PathLike[str]) -> bool:
    """Whether an image has no file of its own."""
    return _file_of(text := str(place)) != text


def state(place: str | PathLike[str]) -> tuple[int, int] | None:
    """Size and modification time (ns) of the file that holds an image; None if it is missing.

    For a URL, as `remote.state` returns them.
    """
    if remote.is_url(text := str(place)):
        return remote.state(text)
    try:
        found = os.stat(_file_of(text))  # noqa: PTH116
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return None
    return found.st_size, found.st_mtime_ns


def locate(place: str | PathLike[str], *, whole: bool = True) -> tuple[int, Callable[[], BinaryIO]]:
    """The size of an image in bytes, and a function that opens it as a file.

    whole: whether all of a remote image is fetched now, or only once more than its head is read.

    Raises OSError with an `errno` if it cannot be read, and FileNotFoundError if it is missing;
    without an `errno`, the message names what is missing. Raises `remote.UnreachableError`, also
    while reading, if it cannot be fetched.
    """
    text = str(place)
    if remote.is_url(text):
        return _fetched(text, whole)
    file = file_of(text)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would block forever
        raise OSError(errno.EBADF, "not a regular file")
    if in_archive := _TAR.fullmatch(text):
        start, length = int(in_archive[2]), int(in_archive[3])
        if start + length > found.st_size:
            raise OSError(errno.EIO, f"{file} ends before it; it was truncated or changed")
        return length, lambda: io.BufferedReader(_InTar(file.open("rb", 0), start, length))
    if in_table := _PARQUET.fullmatch(text):
        data = _cell(file, found, in_table[2], int(in_table[3]), int(in_table[4]))
        return len(data), lambda: io.BytesIO(data)
    return found.st_size, lambda: file.open("rb")


def _fetched(url: str, whole: bool) -> tuple[int, Callable[[], BinaryIO]]:
    """The size of a remote image in bytes, and a function that opens it; see `locate`."""
    size, _, data = remote.fetch(url, whole=whole)
    if size is None and not whole:
        size, _, data = remote.fetch(url, whole=True)
    length = len(data) if size is None else size
    if whole or length <= len(data):
        return length, lambda: io.BytesIO(data)
    return length, lambda: io.BufferedReader(_Begun(url, data, length))


class _Part(io.RawIOBase):
    """Bytes that are read by their place. It has no `fileno`, which would open all of a file."""

    def __init__(self, length: int) -> None:
        self._length, self._place = length, 0

    def _at(self, place: int, size: int) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + (0, self._place, self._length)[whence]
        if place < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = place
        return place

    def _read(self, size: int) -> bytes:
        size = max(0, min(size, self._length - self._place))
        data = self._at(min(self._place, self._length), size)
        self._place += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(self._length)


class _InTar(_Part):
    """Bytes of a file as a file of their own."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        super().__init__(length)
        self._file, self._start = file, start

    def _at(self, place: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, self._start + place)

    def close(self) -> None:
        super().close()
        self._file.close()


class _Begun(_Part):
    """A remote image of which the first bytes are there; all are fetched if others are read."""

    def __init__(self, url: str, data: bytes, length: int) -> None:
        super().__init__(length)
        self._url, self._data = url, data

    def _at(self, place: int, size: int) -> bytes:
        if size and place >= len(self._data):
            self._data = remote.fetch(self._url, whole=True)[2]
        return self._data[place : place + size]

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._read(self._length), b""))


_reading = Lock()
"""Without it, threads that read neighbouring cells would each decode the row group."""


def _cell(file: Path, found: os.stat_result, column: str, group: int, row: int) -> bytes:
    """The bytes of a cell. Raises OSError as `locate` does."""
    import pyarrow as pa

    try:
        with _reading:
            cells = _cells(file, found.st_size, found.st_mtime_ns, column, group)
        if row >= len(cells):
            raise OSError(errno.EIO, f"{file} has no such row; it has changed")
        data = cells[row].as_py()
    except (pa.ArrowException, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        problem = f"{file} is damaged or has changed: {first_line(error)}"
        raise OSError(errno.EIO, problem) from error
    if data is None:
        raise FileNotFoundError("the cell is null")
    return data


@lru_cache(_KEPT)
def _cells(file: Path, size: int, modified: int, column: str, group: int) -> "pa.ChunkedArray":
    """The bytes in a column of a row group; `size` and `modified` are those of the file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        is_struct = pa.types.is_struct(table.schema_arrow.field(column).type)
        name = f"{column}.bytes" if is_struct else column
        cells = table.read_row_group(group, [name], use_threads=False)[column]
    return pc.struct_field(cells, "bytes") if is_struct else cells
