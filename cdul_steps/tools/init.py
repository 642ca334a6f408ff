"""Command init: create a working directory in which `cdul run` writes the results."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from cdul_steps.errors import UserError, nearest
from cdul_steps.shipped import CONFIG, PROJECT

DEMO = "demo"
"""The name of `config/config.yaml` for this command."""
GITIGNORE = "/results/\n/.snakemake/\n"
README = """\
# Files in this folder

| file | contents |
|---|---|
| `config/config.yaml` | the images, the class names to look for, and the settings |
| `config/README.md` | the meaning of every key in the config |
{data}\
| `results/` | all outputs |
| `profiles/slurm/` | for a cluster with SLURM: `cdul run --workflow-profile profiles/slurm` |

`cdul docs` prints the path of the documentation, which these files call `docs/`.

```sh
cdul doctor       # check that everything is there and estimate the run time
cdul run          # make the results; run it again after a change or an interruption
cdul run report   # write results/report/report.html
cdul summary      # print the metrics and the location of the outputs
```

`cdul run` accepts every option of Snakemake: `cdul run --dry-run`.
"""


def configs() -> dict[str, Path]:
    """The configs that come with the project, by the name of each."""
    files = sorted((PROJECT / "config").glob("*.yaml"))
    return {DEMO if file.name == CONFIG.name else file.stem: file for file in files}


def init_folder(folder: Path, name: str) -> Iterator[tuple[Path, bool]]:
    """Write one of the project's configs into a folder, with all files that it needs.

    Yields each file and whether it was written; existing files are not changed. Raises UserError
    for an unknown config name, and OSError.
    """
    known = configs()
    if name not in known:
        raise UserError(f"init: there is no config {name!r}{nearest(name, known)}")
    text = known[name].read_text(encoding="utf-8")
    datasets = yaml.safe_load(text)["datasets"].values()
    # The schema and the command are for a clone.
    text = re.sub(r"^# yaml-language-server.*\n", "", text)
    text = text.replace(f"snakemake --cores all --configfile config/{name}.yaml", "cdul run")
    rows = [f"| `{d['classes']}` | the class names to look for |\n" for d in datasets]
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
