"""Common rules for reading files of other software: text, JSON, numbers, ids, and names.

All readers of data sets, class tables, corrections and `review import` use these functions, so
that all are equally lenient.
"""

import codecs
import json
import mmap
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TextIO, TypeVar

import msgspec

from cdul_steps.errors import UserError

T = TypeVar("T")
Tell = Callable[[str], None]
"""Takes one line about something that was left out, or read differently than written."""

# Invisible letters, marks and a symbol, in addition to the Unicode categories.
_BLANKS = "\u034f\u115f\u1160\u2800\u3164\uffa0"
# Writing systems and emoji need these two between letters.
_JOINERS = "\u200c\u200d"
_SHOWN = 8


def ignore(line: str) -> None:
    """A `Tell` that discards the line."""


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a text file: UTF-8, or UTF-16 with a byte order mark; the mark is skipped."""
    with path.open("rb") as file:
        start = file.read(2)
    wide = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.open(encoding="utf-16" if wide else "utf-8-sig", newline=newline)


def read_text(path: Path) -> str:
    """The text of a file; see `open_text`. Raises OSError and UnicodeError."""
    with open_text(path) as file:
        return file.read()


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file as `kind`; only the fields of `kind` are decoded.

    A byte order mark and the NaN and Infinity of Python's encoder are accepted. Raises OSError,
    ValueError and RecursionError.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_json(data, kind)


def parse_json(data: bytes | mmap.mmap, kind: type[T]) -> T:
    """JSON as `kind`, as `read_json` does. Raises ValueError and RecursionError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # msgspec rejects NaN and a byte order mark
        return msgspec.convert(json.loads(data[:]), kind)


def as_number(value: object) -> float | None:
    """A label or a flag as a number, such as 1 for 1, 1.0, "1", true and "True"; None for a blank.

    NaN counts as a blank, because pandas writes it so. Raises ValueError for anything else.
    """
    text = as_id(value).casefold()
    if text in ("", "nan"):
        return None
    return float(text == "true") if text in ("true", "false") else float(text)


def as_id(value: object) -> str:
    """An id as text: "9" for 9, 9.0 and " 9"; a blank for None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def same(name: str) -> str:
    """The form in which class names are compared.

    It ignores case, Unicode form, spaces, and invisible characters.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    words = "".join(" " if c.isspace() else c for c in folded)
    return " ".join("".join(c for c in words if not _is_unseen(c)).split())


def unseen(name: str) -> str | None:
    """The first invisible character of a name, in words; None if there is none.

    An ordinary space counts as visible; other spaces and control characters do not. Joiners count
    as invisible only at an end of the name.
    """
    for place, char in enumerate(name):
        inside = 0 < place < len(name) - 1
        other_space = char.isspace() and char != " "
        if other_space or (_is_unseen(char) and not (inside and char in _JOINERS)):
            title = unicodedata.name(char, "no printable character").lower()
            return f"U+{ord(char):04X}, {title}"
    return None


def _is_unseen(char: str) -> bool:
    # Cc: control, Cf: format, Cs: surrogate, Zl and Zp: line separators.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") or char in _BLANKS


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def same_image(name: str) -> str:
    """The form in which image names are compared: NFC, forward slashes, no leading `./`."""
    return str(PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")))


def slashes(name: str, folder: Path) -> str:
    """The name of an image below `folder` with forward slashes: lists written on Windows have `\\`.

    If a file with exactly this name exists, the name is not changed.
    """
    if "\\" not in name or _exists(folder / name):
        return name
    return name.replace("\\", "/")


def on_disk(path: Path) -> Path:
    """The path in the Unicode form that exists on the disk; unchanged if none does."""
    if str(path).isascii() or _exists(path):
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next(filter(_exists, forms), path)


def _exists(path: Path) -> bool:
    # Not Path.exists, which raises if the name is too long.
    return os.path.exists(path)  # noqa: PTH110


def listed(counts: Counter[str]) -> str:
    """The most frequent entries in words: `sofa (12), table (3), ...`."""
    common = [(_printable(name), count) for name, count in counts.most_common(_SHOWN)]
    shown = [f"{name} ({count})" if count else name for name, count in common]
    return ", ".join([*shown, *["..."] * (len(counts) > _SHOWN)])


def _printable(name: str) -> str:
    """A name on one line of text: escaped if it contains line breaks or is not UTF-8."""
    return name if name.isprintable() else ascii(name)[1:-1]


class ClassNames:
    """Finds the class of a label, and remembers the labels that match no class.

    A label matches the class with the same name, compared by `same`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._index = {same(name): i for i, name in enumerate(names)}
        self._found: dict[str, int | None] = {}
        self._others: Counter[str] = Counter()

    def find(self, label: str, count: int = 1) -> int | None:
        """The index of a label's class; None if there is none, which counts `count` times."""
        if label not in self._found:
            self._found[label] = self._index.get(same(label))
        index = self._found[label]
        if index is None:
            self._others[label] += count
        return index

    def choose(self, labels: Iterable[str], where: object) -> dict[int, str]:
        """For each class the label that matches it; classes may be missing.

        Raises UserError if several labels match a class, or one label twice.
        """
        chosen: dict[int, str] = {}
        for label in labels:
            index = self.find(label, 0)
            if index is None:
                continue
            if label == chosen.get(index):
                raise UserError(f"{where}: {label.strip()!r} occurs twice; remove one")
            first = chosen.setdefault(index, label)
            if first != label:
                raise UserError(
                    f"{where}: {first!r} and {label!r} both mean {self.names[index]!r}; remove or "
                    "rename one"
                )
        return chosen

    def tell(self, root: Path, tell: Tell, what: str = "labels") -> None:
        """Tell which labels match no class, and which are spelt differently from their class."""
        if self._others:
            tell(f"{root}: {what} that are no class: {listed(self._others)}")
        respelt = [
            f"{label!r} as {self.names[index]!r}"
            for label, index in self._found.items()
            if index is not None and _composed(label) != _composed(self.names[index])
        ]
        if respelt:
            more = ", ..." if len(respelt) > _SHOWN else ""
            tell(f"{root}: read {', '.join(respelt[:_SHOWN])}{more}")
