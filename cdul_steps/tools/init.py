"""Command init: a folder of a person's own, in which `cdul run` makes the results."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from cdul_steps.errors import UserError, nearest
from cdul_steps.shipped import CONFIG, PROJECT

DEMO = "demo"
"""What `config/config.yaml` is called here."""
GITIGNORE = "/results/\n/.snakemake/\n"
README = """\
# What lies where

| place | what |
|---|---|
| `config/config.yaml` | which images, which names to look for, how to learn from them |
| `config/README.md` | what every key of it means |
{data}\
| `results/` | all that is made |
| `profiles/slurm/` | for a cluster with SLURM: `cdul run --workflow-profile profiles/slurm` |

```sh
cdul doctor       # is all there, and how long will it take
cdul run          # make the results; again after a change, or when it was stopped
cdul run report   # results/report/report.html
cdul summary      # the metrics, and where the outputs are
```

Every option of Snakemake can be given to `cdul run`: `cdul run --dry-run`.
"""


def configs() -> dict[str, Path]:
    """The configs that come with the project, by the name of each."""
    files = sorted((PROJECT / "config").glob("*.yaml"))
    return {DEMO if file.name == CONFIG.name else file.stem: file for file in files}


def init_folder(folder: Path, name: str) -> Iterator[tuple[Path, bool]]:
    """Write one of the project's configs into a folder, with all that it needs beside it.

    Yields each file, and whether it was written: what is there stays as it is. Raises UserError
    for a name that is no config's, and OSError.
    """
    known = configs()
    if name not in known:
        raise UserError(f"init: there is no config {name!r}{nearest(name, known)}")
    text = known[name].read_text(encoding="utf-8")
    datasets = yaml.safe_load(text)["datasets"].values()
    # The command and the schema are those of a clone.
    text = re.sub(r"^# yaml-language-server.*\n", "", text)
    text = text.replace(f"snakemake --cores all --configfile config/{name}.yaml", "cdul run")
    rows = [f"| `{d['classes']}` | the names to look for |\n" for d in datasets]
    rows += [
        f"| `{d['root']}` | the images, or a link to them |\n" for d in datasets if "root" in d
    ]
    texts = {
        str(CONFIG): text,
        ".gitignore": GITIGNORE,
        "README.md": README.format(data="".join(rows)),
    }
    copied = ["config/README.md", "profiles/slurm/config.yaml", "profiles/slurm-gres/config.yaml"]
    copied += [d[key] for d in datasets for key in ("classes", "context") if key in d]
    for place in copied:
        texts[place] = (PROJECT / place).read_text(encoding="utf-8")
    for place, written in texts.items():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(written)
        except FileExistsError:
            yield file, False
        else:
            yield file, True
