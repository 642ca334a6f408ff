"""Where the files lie that come with this project: Snakefile, rules, configs, the demo's model."""

from pathlib import Path

PACKAGE = Path(__file__).parent
"""The folder of this package."""
PROJECT = PACKAGE / "project" if (PACKAGE / "project").is_dir() else PACKAGE.parent
"""The folder of Snakefile, workflow/, config/ and profiles/: a wheel has it in the package, and in
a clone they lie beside it."""
SNAKEFILE = PROJECT / "Snakefile"
CONFIG = Path("config/config.yaml")
"""The config that is read first: that of the working directory, or else that of the project."""


def shipped(path: str) -> str:
    """A path such as `config/classes/voc.yaml`: the project's own, if it is nowhere else.

    Relative paths mean the working directory; only what is missing there, and whose first folder
    is `config` or `cdul_steps`, is looked up among the files that come with the project.
    """
    first = path.partition("/")[0]
    own = {"config": PROJECT, PACKAGE.name: PACKAGE.parent}.get(first)
    if own and (own / path).exists() and not Path(path).exists():
        return str(own / path)
    return path


def base_config() -> Path:
    """The config that others are laid over."""
    return CONFIG if CONFIG.is_file() else PROJECT / CONFIG
