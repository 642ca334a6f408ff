"""Files that are either whole or absent, and say which version of their form they have."""

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
"""Of everything that a run leaves behind. One number: a change of any form makes all anew."""


def check_version(path: Path, facts: dict[str, Any]) -> None:
    """Raise UserError where a file's `facts` name another `schema_version` than this one's.

    Files without any are from elsewhere, and judged by what they hold.
    """
    found = facts.get("schema_version", SCHEMA_VERSION)
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{path}: written by another version of this software (schema {found!r}, this one "
            f"reads {SCHEMA_VERSION}); use that version, or delete the file and run snakemake"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises UserError for a file that is missing, torn, no mapping, or of another schema version.
    """
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no JSON mapping; delete it and run snakemake") from error
    check_version(path, found)
    return found


CLOCKS_DIFFER = 60
"""Seconds by which the clocks of machines that share a disk may differ."""


def check_dates(folder: Path) -> None:
    """Raise UserError for a file below `folder` that is dated in the future.

    By such dates Snakemake takes results for newer than what they are made from: it would keep one
    that is out of date, and refuse a new one once its job has worked for hours.
    """
    now = datetime.now()
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            try:
                date = datetime.fromtimestamp(path.lstat().st_mtime)
            except FileNotFoundError:  # of a killed run whose last job is still at work
                continue
            if (date - now).total_seconds() > CLOCKS_DIFFER:
                raise UserError(
                    f"{path} is dated in the future, {date:%Y-%m-%d %H:%M}: a clock is or was "
                    "wrong. Put it right; then, if nothing has been made since, date the results "
                    f"anew by 'find {shlex.quote(str(folder))} -newermt now -exec "
                    f"touch -d {now:%Y-%m-%dT%H:%M} {{}} +', else delete those dated so"
                )


_SHOWN_NAMES = 3


def check_names(names: Iterable[str], folder: Path | None = None) -> None:
    """Raise UserError where tables could not hold some of the file names, which are in `folder`."""
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
"""File in a scratch folder that its writer keeps locked for as long as it lives."""


LEFT_BY_OTHERS = (".snakemake_timestamp", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that Snakemake and file managers put into any folder."""


def check_replaceable(path: Path, holds: Sequence[str] = ()) -> None:
    """Raise UserError unless writing `path` can destroy nothing but an earlier result.

    Without `holds`, `path` is to be a file and must not be a folder. With `holds`, it is to be a
    folder: it may be absent, empty, or hold only files that match these glob patterns of names
    relative to it, the first of which must be there.
    """
    if path.resolve() == path.resolve().parent:
        raise UserError(f"{path}: is the root of all files; give another name")
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
            f"{path}: holds {foreign[0]!r}, not of an earlier result; give a new folder"
        )


@contextmanager
def replacing(path: Path, holds: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it over `path` when the block succeeds.

    What is written is a file or, with `holds`, a folder; what may be replaced is decided by
    `check_replaceable`. A killed writer leaves `path` as it was, and a scratch folder that the
    next writer of `path` removes. Raises OSError that names `path` where there is no room or no
    permission, and UserError as `check_replaceable` does.
    """
    check_replaceable(path, holds)
    if path.name in ("", ".."):  # which cannot be renamed to
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
            # Libraries do not say which file they could not write.
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:  # where a signal to stop cut the first removal short
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Remove the scratch folders of `path` whose writers are no more."""
    with os.scandir(path.parent) as entries:
        scratch = [e.path for e in entries if e.name.startswith(f".{path.name}.") and e.is_dir()]
    for folder in scratch:
        with suppress(OSError), (Path(folder) / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write `data` unless `path` holds just that; True if it was written. Keeps the mtime else."""
    if path.is_file() and path.read_bytes() == data:
        return False
    with replacing(path) as part:
        part.write_bytes(data)
    return True


def digest(path: Path) -> str:
    """Content digest of a file, or of all files of a folder with their names: 32 hex digits.

    Raises UserError where there is neither.
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
    """Write JSON whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
