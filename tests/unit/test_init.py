"""A user's working folder, and the project's files that are found from there."""

from pathlib import Path

import pytest
import yaml
from messages import message_of

from cdul_steps import __version__, shipped
from cdul_steps.config import load
from cdul_steps.tools.doctor import read_config
from cdul_steps.tools.init import configs, init_folder

CONFIGS = ["coco2014", "demo", "nuswide", "photos", "voc2007", "voc2012"]


def test_every_config_of_the_project_can_be_asked_for():
    assert sorted(configs()) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_stands_by_itself(name, tmp_path, monkeypatch):
    written = [file for file, new in init_folder(tmp_path / "mine", name) if new]
    monkeypatch.chdir(tmp_path / "mine")
    config = read_config([])
    (dataset,) = {made.dataset for made in config.made}
    assert dataset == name
    # No file of a clone is copied there.
    assert load(yaml.safe_load(Path("config/config.yaml").read_text())) == config
    for place in (config.datasets[dataset].classes, config.datasets[dataset].context):
        assert place is None or (Path(place).is_file() and not Path(place).is_absolute())
    assert f"`{config.datasets[dataset].classes}`" in Path("README.md").read_text()
    text = Path("config/config.yaml").read_text()
    assert "cdul run" in text or name == "demo"
    assert "yaml-language-server" not in text
    assert len(written) == len({*written}) and all(file.is_file() for file in written)


def test_what_is_there_stays(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("mine: 1\n")
    (tmp_path / "README.md").write_text("my notes\n")
    kept = {file.name for file, new in init_folder(tmp_path, "photos") if not new}
    assert kept == {"config.yaml", "README.md"}
    assert (tmp_path / "config/config.yaml").read_text() == "mine: 1\n"
    assert (tmp_path / "README.md").read_text() == "my notes\n"
    assert (tmp_path / "config/classes/photos.txt").is_file()
    assert not any(new for _, new in init_folder(tmp_path, "photos"))


def test_a_config_that_is_none(tmp_path):
    text = message_of(lambda: list(init_folder(tmp_path / "mine", "voc2070")))
    assert "no config 'voc2070'; did you mean 'voc2007'?" in text
    assert not (tmp_path / "mine").exists()


def test_the_commands(cdul, tmp_path):
    done = cdul("init", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path}/mine/config/config.yaml" in done.stdout
    assert "kept" in cdul("init", tmp_path / "mine").stdout
    assert cdul("--version").stdout == f"cdul {__version__}\n"
    assert Path(cdul("snakefile").stdout.strip()).samefile(shipped.SNAKEFILE)


def test_files_of_the_project_are_found_from_elsewhere(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config([])
    assert Path(config.datasets["demo"].classes).samefile(repository / "config/classes/demo.yaml")
    prefix, _, folder = config.encoders["tiny-clip"].model.partition(":")
    assert prefix == "local-dir" and Path(folder, "open_clip_config.json").is_file()
    assert Path(config.ablation.table).is_file()
    # The user's own file comes first; a path that exists nowhere stays as it is.
    own = tmp_path / "config/classes/demo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("- dog\n")
    assert shipped.shipped("config/classes/demo.yaml") == "config/classes/demo.yaml"
    assert shipped.shipped("config/classes/none.yaml") == "config/classes/none.yaml"
    assert shipped.shipped("README.md") == "README.md"


def test_in_a_clone_paths_stay_as_they_are(repository, monkeypatch):
    """The encoder's name is a param of the rule `encode`: another name would encode all again."""
    monkeypatch.chdir(repository)
    config = read_config([])
    assert config.encoders["tiny-clip"].model == "local-dir:cdul_steps/demo/tiny-clip"
    assert config.datasets["demo"].classes == "config/classes/demo.yaml"
    assert config.ablation.table == "config/ablation.tsv"
