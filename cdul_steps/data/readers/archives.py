"""Shared by the readers of archives: the archives of a split, and the classes of a label."""

import glob
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cdul_steps.data.files import check_names
from cdul_steps.data.foreign import ClassNames, Tell, listed
from cdul_steps.data.readers.record import pattern_of
from cdul_steps.errors import UserError

_BRACES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def archives_of(
    root: Path, splits: Mapping[str, str], suffix: str, exclude: Sequence[str], tell: Tell
) -> list[tuple[str, str, Path]]:
    """For each archive our name of its split, its name below the top folder, and its path.

    root: the top folder; or a file, a glob or a brace pattern, with the top folder before the first
    wildcard. splits: "." for all of these archives, or a folder, a file, a glob or a brace pattern
    below the top folder. suffix: of the archives' names; other files are reported, as are archives
    that match a pattern of `exclude` (see `pattern_of`).

    Raises UserError if a pattern names a missing file or no archive, or if an archive is in two
    splits.
    """
    top, others = root if root.is_dir() else _top(root), Counter[str]()
    pattern = "." if top == root else root.relative_to(top).as_posix()
    known = _named(top, pattern, suffix, others)
    owner: dict[str, str] = {}
    for split, own in splits.items():
        if Path(own).is_absolute() or ".." in Path(own).parts:
            raise UserError(
                f"split '{split}': '{own}' is not below {top}; give a folder or a pattern of "
                f"{suffix} files in it, or '.' for all"
            )
        names = known if Path(own) == Path() else known & _named(top, own, suffix, Counter())
        for name in sorted(names):
            if (other := owner.setdefault(name, split)) != split:
                raise UserError(
                    f"{top / name} is in the splits '{other}' and '{split}'; give them patterns "
                    "under 'splits' that have no archive in common"
                )
    check_names(owner, top)
    excluded = {name: found for name in owner if (found := pattern_of(name, exclude))}
    left_out = {f"not ending in {suffix}": others, "by 'exclude'": Counter(excluded.values())}
    for why, counts in left_out.items():
        if number := counts.total():
            tell(f"{root}: left out {number} file{'s' * (number > 1)} {why}: {listed(counts)}")
    return [(split, name, top / name) for name, split in owner.items() if name not in excluded]


def _top(pattern: Path) -> Path:
    parts = pattern.parts[:-1]
    wild = (i for i, part in enumerate(parts) if glob.has_magic(part) or _BRACES.search(part))
    return Path(*parts[: next(wild, len(parts))])


def _named(top: Path, pattern: str, suffix: str, others: Counter[str]) -> set[str]:
    """The names, relative to `top`, of the archives that match a pattern; counts the `others`."""
    found: list[Path] = []
    for one in expand(pattern):
        if (top / one).is_dir():
            found += _below(top / one)
        elif (top / one).exists():
            found.append(top / one)
        elif glob.has_magic(one):
            found += _matching(top, one)
        else:
            raise UserError(
                f"{top / one}: no such file or folder; download it, or check the pattern"
            )
    if compressed := [path for path in found if _COMPRESSED.search(path.name)]:
        raise UserError(
            f"{compressed[0]}: is compressed, so no part of it can be read by itself; make it a "
            "plain .tar, or give a pattern without it"
        )
    archives = {path for path in found if path.suffix == suffix and not path.is_dir()}
    others.update(_kind(path) for path in found if path not in archives)
    if not archives:
        raise UserError(f"{top / pattern}: no {suffix} file found; check 'root' and 'splits'")
    return {path.relative_to(top).as_posix() for path in archives}


def _below(folder: Path) -> list[Path]:
    """All files below a folder except hidden ones; links to folders are not followed."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or not path.is_dir())
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _matching(top: Path, pattern: str) -> list[Path]:
    try:
        return sorted(top.glob(pattern))
    except ValueError as error:
        raise UserError(f"{top / pattern}: not a file pattern: {error}; correct it") from error


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else path.suffix or "no suffix"


def expand(pattern: str) -> list[str]:
    """The expansions of a brace pattern such as `{00..99}.tar` or `{a,b}`."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        numbers = range(int(first), int(last) + 1)
        choices = [f"{number:0{len(first)}}" for number in numbers]
    else:
        choices = words.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for choice in choices for one in expand(f"{before}{choice}{after}")]


def positives(labels: Sequence[object], names: ClassNames, where: str) -> tuple[int, ...]:
    """The classes of labels: names, or numbers that count from 0 in the class file.

    `names` remembers a name that is not a class. Raises UserError, which begins with `where`, for
    a number without a class, and for anything that is neither.
    """
    found = set()
    for label in labels:
        index = names.find(label) if isinstance(label, str) else label
        if isinstance(label, str) and index is None:
            continue
        if type(index) is not int or not 0 <= index < len(names.names):
            raise UserError(
                f"{where}: the label {label!r} is neither a name nor one of the numbers 0 to "
                f"{len(names.names) - 1} of the class file; correct it, or the class file"
            )
        found.add(index)
    return tuple(sorted(found))
