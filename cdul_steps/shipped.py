"""Locations of the files that come with this project: workflow, configs, docs, demo model."""

from pathlib import Path

from cdul_steps.errors import UserError

PACKAGE = Path(__file__).parent
"""The folder of this package."""
PROJECT = PACKAGE / "project" if (PACKAGE / "project").is_dir() else PACKAGE.parent
"""The folder of Snakefile, workflow/, config/, profiles/ and docs/: inside the package in a wheel,
next to the package in a clone."""
SNAKEFILE = PROJECT / "Snakefile"
DOCS = PROJECT / "docs"
CONFIG = Path("config/config.yaml")
"""The config that is read first, from the working directory or else from the project."""


def shipped(path: str) -> str:
    """A path such as `config/classes/voc.yaml`; the project's own file if there is no other.

    Paths are relative to the working directory; only files that are missing there, and whose first
    folder is `config` or `cdul_steps`, are looked up among the files that come with the project.
    """
    first = path.partition("/")[0]
    own = {"config": PROJECT, PACKAGE.name: PACKAGE.parent}.get(first)
    if own and (own / path).exists() and not Path(path).exists():
        return str(own / path)
    return path


def require_config(folder: Path) -> None:
    """Raise UserError for a folder without a config, where the demo's would be used instead."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder / CONFIG}: no such file; go to a folder that 'cdul init' has written, or "
            "give a config with --configfile"
        )


def base_config() -> Path:
    """The base config, which other configs override."""
    return CONFIG if CONFIG.is_file() else PROJECT / CONFIG
