"""The web pages of gallery and check: their own files, and those that both use."""

import shutil
from pathlib import Path

from cdul_steps.provenance import PACKAGE


def page_files(page: str) -> list[Path]:
    """The files of a page: "gallery" or "check"."""
    return sorted(file for name in (page, "shared") for file in (PACKAGE / name).iterdir())


def copy_page(page: str, folder: Path) -> None:
    """Copy the files of a page to a new folder."""
    folder.mkdir()
    for file in page_files(page):
        shutil.copy(file, folder)
