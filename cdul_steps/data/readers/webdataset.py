"""WebDataset: tar files in which related members share a name and differ in the suffix."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cdul_steps.data.files import check_names
from cdul_steps.data.foreign import ClassNames, Tell, ignore, listed, parse_json
from cdul_steps.data.readers.archives import archives_of, positives
from cdul_steps.data.readers.record import IMAGE_SUFFIXES, ImageRecord
from cdul_steps.data.sources import in_tar
from cdul_steps.data.tar import FILE, Member, members
from cdul_steps.errors import UserError, first_line

MAX_LABEL = 1 << 20
"""Largest size, in bytes, of a member with labels."""
_LABELS = (".cls", ".json")
_SHOWN = 40
"""Largest length, in characters, of a suffix in a message."""


def read_webdataset(
    root: Path,
    splits: Mapping[str, str],
    classes: Sequence[str],
    tell: Tell = ignore,
    exclude: Sequence[str] = (),
) -> list[ImageRecord]:
    """Read uncompressed tar files in WebDataset's format, as img2dataset writes them.

    root, splits, exclude: the archives, as for `archives_of`; their names end in `.tar`.

    A member's key is its name up to the first dot of its last part, and its suffix is the rest; an
    image has one of IMAGE_SUFFIXES. Its id is the archive's name below the top folder, a slash and
    its key; the order is that of archives and members. The truth is the list `labels` in the
    key's `.json`, or else the single label in its `.cls`; see `positives`. Without either, or
    without classes, it is unknown. Other members are left out and reported.

    Raises UserError.
    """
    names, left_out = ClassNames(classes), Counter[str]()
    records = []
    for split, name, path in archives_of(root, splits, ".tar", exclude, tell):
        try:
            with path.open("rb") as file:
                records += _read(file, path, name, split, names, left_out)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if number := left_out.total():
        what = f"member{'s' * (number > 1)} that are not images"
        tell(f"{root}: left out {number} {what}: {listed(left_out)}")
    names.tell(root, tell)
    return records


def _read(
    file: BinaryIO, path: Path, name: str, split: str, names: ClassNames, left_out: Counter[str]
) -> list[ImageRecord]:
    """The images of one archive; other members are counted by kind or suffix."""
    images: list[tuple[str, Member]] = []
    truth: dict[tuple[str, str], tuple[int, ...]] = {}
    for member in members(file, path):
        text = os.fsdecode(member.name).removeprefix("./")
        folder, slash, last = text.rpartition("/")
        stem, dot, suffix = last.partition(".")
        key, suffix = f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()
        if member.kind != FILE:
            left_out[member.kind] += 1
        elif not stem:
            left_out["hidden"] += 1
        elif suffix in IMAGE_SUFFIXES:
            images.append((key, member))
        elif suffix not in _LABELS or not names.names:
            left_out[suffix[:_SHOWN] or "no suffix"] += 1
        elif (labels := _labels(file, member, suffix, f"{path}, {text!r}")) is None:
            left_out[f"{suffix} without labels"] += 1
        elif (key, suffix) in truth:
            raise UserError(
                f"{path}: has two members {text!r}, whose labels may differ; remove one"
            )
        else:
            truth[key, suffix] = positives(labels, names, f"{path}, {text!r}")
    check_names((key for key, _ in images), path)
    if alone := {key for key, _ in truth} - {key for key, _ in images}:
        left_out["labels without an image"] += len(alone)
    return [
        ImageRecord(
            f"{name}/{key}",
            split,
            in_tar(path.as_posix(), member.start, member.size),
            truth.get((key, ".json"), truth.get((key, ".cls"))),
        )
        for key, member in images
    ]


def _labels(file: BinaryIO, member: Member, suffix: str, where: str) -> list[Any] | None:
    """The labels in a member; None if it has none.

    Raises UserError, which begins with `where`, for one that cannot be read.
    """
    if member.size > MAX_LABEL:
        raise UserError(f"{where}: {member.size} bytes are too many for labels; remove it")
    data = os.pread(file.fileno(), member.size, member.start)
    try:
        if suffix == ".cls":
            text = data.decode("utf-8-sig").strip()
            return [int(text) if text.isdecimal() else text] if text else None
        content = parse_json(data, Any)
    except (ValueError, RecursionError) as error:  # UTF-8's and JSON's
        raise UserError(f"{where}: cannot be read: {first_line(error)}; correct it") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list | None):
        raise UserError(f"{where}: 'labels' is not a list of class names; correct it")
    return labels
