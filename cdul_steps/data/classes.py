"""The class table: the classes, their order, and their names in prompts."""

import re
import reprlib
import unicodedata
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import yaml

from cdul_steps.data.foreign import read_text, same, unseen
from cdul_steps.errors import UserError
from cdul_steps.method.choices import NEARNESS

# Columns of our tables other than the class columns.
RESERVED_NAMES = ("image_id", "path", "split", "labels", "status", "corrected")


SHORT = reprlib.Repr()
SHORT.maxlevel = 1  # nested lists would still be long


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set; a class index is a position in these tuples.

    names: unique class names (Unicode NFC), used as column names.
    aliases: for each class the names that prompts use, at least one.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ContextList:
    """The file of the context names, and exceptions from the rule that leaves out close ones.

    keep: names to keep even if they are close to a class. nearness: centred cosine from which a
    name is too close (see `find_near`); 1 leaves out only a class's own names.
    """

    path: Path
    keep: tuple[str, ...] = ()
    nearness: float = NEARNESS


def load_classes(path: Path) -> ClassTable:
    """Read a class table from YAML (`.yaml`, `.yml`) or from text (any other suffix).

    YAML: a list whose entries are a name, or a mapping `{name: ..., aliases: [...]}`.
    Text: one name per line; blank lines and lines that start with `#` are ignored.

    Raises UserError for a missing, unreadable or empty table, an unknown key, and a name that is
    empty, not a string, reserved, listed twice (compared by `same`), contains an invisible
    character, or is written as in another kind of list.
    """
    table = _load(path, "class table")
    for number, name in enumerate(table.names, 1):
        if same(name) in RESERVED_NAMES:
            raise UserError(
                f"class table {path}, entry {number}: '{name}' is the name of a table column; "
                "rename the class"
            )
    return table


def load_names(
    classes: Path, context: Path | None, keep: Sequence[str] = ()
) -> tuple[ClassTable, ClassTable]:
    """Read the class table and the context list, which has the same format; it may be missing.

    `keep` are context names to keep even if they are close to a class. Raises UserError as
    `load_classes` does, and for a name to keep that is not in the list or is a class. No context
    name is reserved, because none becomes a column.
    """
    table = load_classes(classes)
    listed = _load(context, "context list") if context else ClassTable((), ())
    taken = {same(name) for name in table.names}
    for name in keep:
        if name not in listed.names:
            raise UserError(f"context_keep: {name!r} is not in {context}; spell it as in that file")
        if same(name) in taken:
            raise UserError(f"context_keep: {name!r} is a class and cannot be context; remove it")
    return table, listed


def _load(path: Path, what: str) -> ClassTable:
    try:
        text = read_text(path)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{what} {path}: cannot be read ({getattr(error, 'strerror', 'not UTF-8 text')}); "
            "give a YAML list, or a UTF-8 text file with one name per line"
        ) from error
    if path.suffix.lower() in (".yaml", ".yml"):
        entries = _yaml_entries(text, f"{what} {path}")
    else:
        lines = (line.strip() for line in text.split("\n"))
        listed = [line for line in lines if line and not line.startswith("#")]
        _check_lines(listed, f"{what} {path}")
        entries = list[object](listed)
    if not entries:
        noun = "classes" if what == "class table" else "names"
        raise UserError(f"{what} {path}: no {noun}; list at least one name")

    names: list[str] = []
    aliases: list[tuple[str, ...]] = []
    seen: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        name, others = _entry(entry, f"{what} {path}, entry {number}")
        key = same(name)
        if key in seen:
            noun = "class " if what == "class table" else ""
            raise UserError(
                f"{what} {path}, entry {number}: {noun}'{name}' is listed twice"
                + f" (as '{seen[key]}', which differs only in case or form)" * (seen[key] != name)
                + "; remove one"
            )
        seen[key] = name
        names.append(name)
        aliases.append(others)
    return ClassTable(tuple(names), tuple(aliases))


def check_choice(names: Sequence[str], context: Sized, where: object) -> None:
    """Raise UserError for a single name, whose softmax is 1 for every image."""
    if len(names) + len(context) < 2:
        raise UserError(
            f"{where}: has one class, {names[0]!r}, whose softmax is 1 for every image; give a "
            "list of what else the images show as the data set's 'context', or a second class"
        )


def same_prompts(names: Sequence[str], prompted: Sequence[Sequence[str]]) -> list[list[str]]:
    """Groups of classes with identical prompts; `prompted` are the names in the prompts."""
    groups: dict[frozenset[str], list[str]] = {}
    for name, used in zip(names, prompted, strict=True):
        groups.setdefault(frozenset(same(word) for word in used), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


_OTHER_LISTS = (
    (r"[-*\u2022]\s.*", "begins as in a list of YAML or Markdown"),
    (r"[\[{].*|[\]}],?", "is JSON"),
    (r"\".*\",?|'.*',?", "is in quotes"),
)
"""Patterns of lines from other kinds of lists, with the message for each."""


def _check_lines(lines: Sequence[str], where: str) -> None:
    """Raise UserError if the lines belong to another kind of list."""
    advice = "write one name per line and nothing else, or give a YAML list the suffix .yaml"
    for number, line in enumerate(lines, 1):
        for pattern, what in _OTHER_LISTS:
            if re.fullmatch(pattern, line):
                raise UserError(f"{where}, entry {number}: {SHORT.repr(line)} {what}; {advice}")
    if len(lines) == 1 and "," in lines[0]:
        raise UserError(f"{where}: all names are on one line; {advice}")
    numbers = [re.match(r"(\d+)\s*[.):,;]?\s", line) for line in lines]
    first = int(numbers[0][1]) if numbers and numbers[0] else 0
    counted = [str(first + place) for place in range(len(lines))]
    if len(lines) > 1 and [match and match[1] for match in numbers] == counted:
        raise UserError(f"{where}: its lines are numbered; {advice}")


def _yaml_entries(text: str, where: str) -> list[object]:
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise UserError(
            f"{where}: expected a list of names ('- cat'), found {_kind(entries)} at the top level"
        )
    return entries


def _entry(entry: object, where: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(entry, dict):
        name = _name(entry, where)
        return name, (name,)
    for key in entry:
        if key not in ("name", "aliases"):
            raise UserError(f"{where}: unknown key '{key}'; the keys are name and aliases")
    if "name" not in entry:
        raise UserError(f"{where}: the key 'name' is missing; write {{name: ..., aliases: [...]}}")
    name = _name(entry["name"], where)
    if "aliases" not in entry:
        return name, (name,)
    aliases = entry["aliases"]
    if not isinstance(aliases, list) or not aliases:
        raise UserError(
            f"{where} ('{name}'): aliases must be a list of at least one name; "
            "leave out the key to use the class name"
        )
    return name, tuple(_name(alias, f"{where} ('{name}'), aliases") for alias in aliases)


def _name(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: a name must be text, found {SHORT.repr(value)} ({_kind(value)}); "
            "put the name in quotes (YAML reads a bare no, on or 1 as something else)"
        )
    name = unicodedata.normalize("NFC", value).strip()
    if not name:
        raise UserError(f"{where}: the name is empty; give it a name or remove the entry")
    if problem := unseen(name):
        raise UserError(
            f"{where}: {name!r} has a character that cannot be seen ({problem}); write the name "
            "without it, with ordinary spaces"
        )
    if name[-1] in ",;":
        raise UserError(f"{where}: '{name}' ends with a {name[-1]!r}; remove it")
    return name


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    return {dict: "a mapping", str: "text", bool: "a yes/no value", list: "a list"}.get(
        type(value), f"a value of type {type(value).__name__}"
    )
