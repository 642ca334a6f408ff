"""The workflow as snakedeploy deploys it: a module from a tag of a GitHub repository."""

import os
import subprocess

import launcher
import yaml
from copies import PARTS, ROOT, SMALL_TRAINING

SNAKEFILE = """
configfile: "config/config.yaml"


module cdul:
    snakefile:
        github("someone/cdul", path="workflow/Snakefile", tag="v0.0.1")
    config:
        config


use rule * from cdul
"""


def test_deployed(tmp_path):
    """The rules come from the tag; package and demo model come from the installation."""
    source, bare = tmp_path / "source", tmp_path / "bare/someone/cdul.git"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
    }

    def run(*words: str, folder=tmp_path) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    (tmp_path / "gitconfig").write_text(
        f'[url "{tmp_path}/bare/"]\n\tinsteadOf = https://github.com/\n'
        "[user]\n\tname = a\n\temail = a@b\n[safe]\n\tdirectory = *\n"
    )
    source.mkdir()
    run("git", "init", "--quiet", folder=source)
    # Without the package: a deployment uses only the repository's rules.
    for part in {*PARTS} - {"cdul_steps"}:
        run("cp", "-r", str(ROOT / part), part, folder=source)
    run("git", "add", ".", folder=source)
    run("git", "commit", "--quiet", "-m", "all", folder=source)
    run("git", "tag", "v0.0.1", folder=source)
    run("git", "clone", "--quiet", "--bare", str(source), str(bare))

    mine = tmp_path / "mine"
    (mine / "workflow").mkdir(parents=True)
    (mine / "workflow/Snakefile").write_text(SNAKEFILE)
    (mine / "config").mkdir()
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["datasets"]["demo"]["scenes"] = {"train": 4, "test": 2, "size": 64}
    config["trainings"]["aligned"] = SMALL_TRAINING
    (mine / "config/config.yaml").write_text(yaml.safe_dump(config))
    scenes = "results/demo/scenes/scenes.csv"
    run(str(launcher.commands() / "snakemake"), "--cores", "1", scenes, folder=mine)
    assert (mine / scenes).is_file()
