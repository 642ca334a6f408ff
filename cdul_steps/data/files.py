"""Files that are either complete or absent, and record the version of their format."""

import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cdul_steps.errors import UserError

SCHEMA_VERSION = 1
"""Version of everything that a run writes. A change of any format invalidates all results."""


def check_version(path: Path, facts: dict[str, Any]) -> None:
    """Raise UserError if a file's `facts` have a `schema_version` other than the current one.

    Files without a version come from other software and are judged by their content.
    """
    found = facts.get("schema_version", SCHEMA_VERSION)
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path}: written by another version of this software (schema {found!r}, this one "
            f"reads {SCHEMA_VERSION}); use that version, or delete the file and run 'cdul run'"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises UserError for a file that is missing, corrupt, not a mapping, or of another schema
    version.
    """
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON mapping; delete it and run 'cdul run'") from error
    check_version(path, found)
    return found


CLOCKS_DIFFER = 60
"""Tolerated difference, in seconds, between the clocks of machines that share a disk."""


def check_dates(folder: Path) -> None:
    """Raise UserError for a file below `folder` that is dated in the future.

    With such dates Snakemake takes results to be newer than their inputs: it would keep an
    outdated result, or reject a new one after its job has run for hours.
    """
    now = datetime.now()
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            try:
                date = datetime.fromtimestamp(path.lstat().st_mtime)
            except FileNotFoundError:  # the last job of a killed run is still running
                continue
            if (date - now).total_seconds() > CLOCKS_DIFFER:
                raise UserError(
                    f"{path} is dated in the future, {date:%Y-%m-%d %H:%M}: a clock is or was "
                    "wrong. Correct the clock; then, if nothing has been made since, reset the "
                    f"dates with 'find {shlex.quote(str(folder))} -newermt now -exec "
                    f"touch -d {now:%Y-%m-%dT%H:%M} {{}} +', or else delete the files with such "
                    "dates"
                )


_SHOWN_NAMES = 3


def check_names(names: Iterable[str], folder: Path | None = None) -> None:
    """Raise UserError if some of the file names, in `folder`, cannot be stored in tables."""
    bad = [name for name in names if not _is_utf8(name)]
    if not bad:
        return
    where = f"{folder}: " if folder else ""
    shown = ", ".join(repr(os.fsencode(name)) for name in bad[:_SHOWN_NAMES])
    if len(bad) == 1:
        raise UserError(f"{where}the file name {shown} is not valid UTF-8; rename the file")
    more = ", ..." if len(bad) > _SHOWN_NAMES else ""
    raise UserError(
        f"{where}{len(bad)} file names are not valid UTF-8: {shown}{more}; rename the files, for "
        "example by: convmv -r -f latin1 -t utf8 --notest FOLDER"
    )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


LOCK = ".lock"
"""File in a scratch folder that its writer keeps locked while it runs."""


LEFT_BY_OTHERS = (".snakemake_timestamp", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that Snakemake and file managers create in any folder."""


def check_replaceable(path: Path, holds: Sequence[str] = ()) -> None:
    """Raise UserError unless writing `path` can destroy only an earlier result.

    Without `holds`, `path` is a file to write and must not be a folder. With `holds`, it is a
    folder to write: it may be absent, empty, or contain only files that match these glob patterns
    of relative names, and at least one that matches the first.
    """
    if path.resolve() == path.resolve().parent:
        raise UserError(f"{path}: is the root folder; give another name")
    if not holds:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the name of a file to write")
        return
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            raise UserError(f"{path}: is a file; give the name of a folder to write")
        return
    found = sorted(
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_symlink() or not file.is_dir()
    )
    patterns = (*holds, *LEFT_BY_OTHERS)
    foreign = [name for name in found if not any(fnmatch(name, p) for p in patterns)]
    if found and not any(fnmatch(name, holds[0]) for name in found):
        foreign = foreign or found
    if foreign:
        raise UserError(
            f"{path}: contains {foreign[0]!r}, which is not from an earlier result; give a new "
            "folder"
        )


@contextmanager
def replacing(path: Path, holds: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary name next to `path`; rename it to `path` when the block succeeds.

    The block writes a file or, with `holds`, a folder; `check_replaceable` decides what may be
    replaced. A killed writer leaves `path` unchanged, and a scratch folder that the next writer of
    `path` removes. Raises OSError that names `path` if there is no space or no permission, and
    UserError as `check_replaceable` does.
    """
    check_replaceable(path, holds)
    if path.name in ("", ".."):  # not valid targets of a rename
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            scratch.mkdir(mode=0o700)
            with (scratch / LOCK).open("w") as lock:
                with suppress(OSError):  # not every network file system can lock
                    fcntl.flock(lock, fcntl.LOCK_EX)
                part = scratch / path.name
                yield part
                old = scratch / "old"
                if path.is_dir() and not path.is_symlink():
                    path.rename(old)
                try:
                    part.replace(path)
                except OSError:
                    if old.exists():
                        old.rename(path)
                    raise
        except OSError as error:
            if error.filename or not error.errno:
                raise
            # Libraries do not report which file they could not write.
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:  # in case a signal interrupted the first removal
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Remove the scratch folders of `path` whose writers have ended."""
    with os.scandir(path.parent) as entries:
        scratch = [e.path for e in entries if e.name.startswith(f".{path.name}.") and e.is_dir()]
    for folder in scratch:
        with suppress(OSError), (Path(folder) / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write `data` unless `path` already contains it, which keeps the mtime; True if written."""
    if path.is_file() and path.read_bytes() == data:
        return False
    with replacing(path) as part:
        part.write_bytes(data)
    return True


def digest(path: Path) -> str:
    """Content digest of a file, or of all files of a folder with their names: 32 hex digits.

    Raises UserError if neither exists.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    result = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        result.update(os.fsencode(file.relative_to(path)) + b"\0")
        with file.open("rb") as stream:
            result.update(hashlib.file_digest(stream, lambda: hashlib.blake2b()).digest())
    return result.hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
