"""Real machine faults: full and read-only disks, users without permission."""

import os
import pickle
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A separate file system at `folder`; skips the test if none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a `small_disk`: `size=8m`, `ro`, `rw`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user can access, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def as_nobody(function: Callable[[], object]) -> object:
    """Run a function as an ordinary user, in a separate process; returns its result.

    Import all modules before: an ordinary user may not be able to read them.
    """
    if os.geteuid() != 0:
        return function()  # an ordinary user already
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            result = function()
        except BaseException:
            result = traceback.format_exc()
        os.write(writer, pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        result = pickle.loads(stream.read())
    os.waitpid(child, 0)
    return result
