"""The members of an uncompressed tar: only headers are read, and nothing is unpacked.

Python's tarfile keeps every header in memory, and treats a damaged header as the end.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cdul_steps.errors import UserError

BLOCK = 512
MAX_HEADER = 1 << 20
"""Largest size, in bytes, of a member's long name or extended fields."""
MAX_PADDING = 1 << 20
"""Largest number of zeros at the end. Up to 10 KiB is usual; an unfinished download has more."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_AGAIN = "download or make it again, or leave it out with 'exclude'"
FILE = "file"
_EMPTY = {b"1": "hard link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder"}
_EMPTY |= {b"6": "pipe"}
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"S": "sparse file", **_EMPTY}
# Extra headers of the next member: GNU's long name and long link name, and POSIX's fields; and
# POSIX's fields for all following members, which are ignored here.
_FURTHER = _NAME, _LINK, _FIELDS, _OF_ALL = b"L", b"K", b"x", b"g"
_FIELD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """A member of a tar.

    name: as stored; never opened as a path. kind: FILE, or another kind in words. start, size:
    the position of its bytes.
    """

    name: bytes
    kind: str
    start: int
    size: int


def members(file: BinaryIO, path: Path) -> Iterator[Member]:
    """The members of an open tar in order; concatenated tars are read to the end.

    Raises UserError, naming `path`, if it is compressed, not a tar, damaged or truncated.
    """
    end = os.fstat(file.fileno()).st_size
    place, last, ended = 0, 0, False
    name, fields = b"", dict[bytes, bytes]()
    while place < end:
        header = os.pread(file.fileno(), BLOCK, place)
        if ended := not header.strip(b"\0"):
            place += BLOCK
            continue
        if place and len(header) < BLOCK:
            break
        try:
            _check(header)
            kind = header[156:157]
            size = _number(header[124:136])
            if kind not in _FURTHER:
                size = 0 if kind in _EMPTY else _whole(int(fields.get(b"size", size)))
        except ValueError as error:
            raise UserError(f"{path}: {_problem(header, place)}") from error
        start = place + BLOCK
        # In GNU sparse files, the list of parts precedes the bytes.
        more = kind == b"S" and header[482] != 0
        while more:
            more = os.pread(file.fileno(), BLOCK, start)[504:505].strip(b"\0") != b""
            start += BLOCK
        place = start + -(-size // BLOCK) * BLOCK
        if start + size > end:
            break
        if kind in _FURTHER:
            data = _further(file, path, start, size)
            if kind == _NAME:
                name = data.split(b"\0", 1)[0]
            elif kind == _FIELDS:
                fields = _fields_of(data, path, start)
            continue
        name = fields.get(b"path", name or _name_of(header))
        yield Member(name, _kind_of(kind, name, fields), start, size)
        name, fields, last = b"", {}, place
    if not ended:
        raise UserError(
            f"{path}: ends at byte {end} without an end-of-archive marker, so it was truncated; "
            f"{_AGAIN}"
        )
    if end - last > MAX_PADDING:
        raise UserError(
            f"{path}: only zeros from byte {last} on, as after an interrupted download; {_AGAIN}"
        )


def _kind_of(kind: bytes, name: bytes, fields: dict[bytes, bytes]) -> str:
    """The kind of a member, in words."""
    if any(key.startswith(b"GNU.sparse.") for key in fields):
        return _KINDS[b"S"]
    word = _KINDS.get(kind, "member of another kind")
    # The oldest tars store folders as files whose names end in a slash.
    return _EMPTY[b"5"] if word == FILE and name.endswith(b"/") else word


def _check(header: bytes) -> None:
    """Raise ValueError if the checksum of a header is wrong."""
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError


def _number(field: bytes) -> int:
    """A number in a header, octal or in GNU's format for large numbers. Raises ValueError."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return _whole(int(field.split(b"\0", 1)[0].strip() or b"0", 8))


def _whole(number: int) -> int:
    """The number; ValueError if it is negative, which would move backwards."""
    if number < 0:
        raise ValueError
    return number


def _name_of(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _further(file: BinaryIO, path: Path, start: int, size: int) -> bytes:
    """The contents of an extra header for the next member."""
    if size > MAX_HEADER:
        raise UserError(
            f"{path}: {size} bytes at byte {start} for the name and the fields of a member, more "
            f"than the limit of {MAX_HEADER}; {_AGAIN}"
        )
    return os.pread(file.fileno(), size, start)


def _fields_of(data: bytes, path: Path, start: int) -> dict[bytes, bytes]:
    """POSIX's extended fields of a member, each written as `LENGTH KEY=VALUE` and a newline."""
    found, place = {}, 0
    while place < len(data) and data[place]:
        field = _FIELD.match(data, place)
        after = place + int(field[1]) if field else place
        if not field or not field.end() < after <= len(data):
            raise UserError(
                f"{path}: damaged at byte {start + place}, in the fields of a member; {_AGAIN}"
            )
        found[field[2]] = data[field.end() : after - 1]
        place = after
    return found


def _problem(header: bytes, place: int) -> str:
    """The problem of a tar that has no valid header at `place`."""
    if place:
        return f"damaged at byte {place}, where a member should begin; {_AGAIN}"
    for start, name in _COMPRESSED.items():
        if header.startswith(start):
            return (
                f"is compressed with {name}, so no part can be read by itself; make it a plain .tar"
            )
    return f"is not a tar; {_AGAIN}"
