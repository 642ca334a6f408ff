"""The doctor: what it accepts, what it reports as a problem, and what it measures."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import tiny
import yaml
from messages import message_of
from typer.testing import CliRunner

from cdul_steps import cli
from cdul_steps.errors import UserError
from cdul_steps.tools import doctor
from cdul_steps.tools.doctor import examine, read_config


def overlay(folder: Path, **sections) -> Path:
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def found(file: Path, **options) -> dict:
    return {finding.check: finding for finding in examine([file], **{"seconds": 0, **options})}


@pytest.fixture
def small(repository, tmp_path, monkeypatch) -> Path:
    """A reduced demo."""
    monkeypatch.chdir(repository)
    training = {"model": "test_resnet", "image_size": 32, "epochs": 3, "batch_size": 4}
    return overlay(
        tmp_path,
        results=str(tmp_path / "results"),
        datasets={"demo": {"scenes": {"train": 30, "test": 10, "size": 64}}},
        run={"trainings": ["small"]},
        trainings={"small": training},
        runtime={"workers": 0, "device": "cpu"},
    )


def run(*words: object):
    return CliRunner().invoke(cli.app, ["doctor", *map(str, words)])


def test_all_is_well(small, tmp_path):
    done = run("--configfile", small, "--seconds", 0.2, "--json")
    assert done.exit_code == 0, done.output
    values = {finding["check"]: finding["values"] for finding in json.loads(done.stdout)}
    assert list(values) == [
        "software",
        "config",
        "device",
        "data demo",
        "encoder tiny-clip",
        "encode tiny-clip demo",
        "training small",
        "train small",
        "disk",
    ]
    assert values["data demo"] == {
        "images": {"train": 30, "test": 10},
        "views": 400,
        "classes": 12,
        "context": 0,
    }
    dimension = values["encoder tiny-clip"]["dimension"]
    parameters = values["training small"]["parameters"]
    needed = 40 * (10 * (2 * dimension + 4 * 12) + 3 * 64 * 64) + 16 * parameters
    assert values["disk"]["needed"] == needed < values["disk"]["free"]
    encode, train = values["encode tiny-clip demo"], values["train small"]
    assert encode["seconds"] == pytest.approx(400 / encode["views_per_second"])
    assert train["seconds"] == pytest.approx(3 * 30 / train["images_per_second"])
    assert not (tmp_path / "results").exists()


def test_second_views_take_time_too(small, tmp_path):
    values = yaml.safe_load(small.read_text())
    joined = {"join": [{"labels": "final"}, {"labels": "final", "boxes": "seen"}]}
    values["labels"] = {"second": joined, "again": joined}
    values["boxes"] = {"seen": {"labels": "final", "training": "small", "classes": 4}}
    values["run"]["labels"] = ["final", "second", "again"]
    encode = found(overlay(tmp_path, **values), seconds=0.2)["encode tiny-clip demo"]
    # 40 images with ten views, and 30 of them with one and four.
    assert " 400 views and 150 second views " in encode.text
    assert encode.values["seconds"] == pytest.approx(550 / encode.values["views_per_second"])


def test_a_problem_gives_status_one_and_a_line(small, tmp_path):
    done = run("--configfile", overlay(tmp_path, run={"labels": ["fnal"]}))
    assert done.exit_code == 1
    *_, line = done.stdout.splitlines()
    assert line.startswith("problem  config: config: run.labels names 'fnal'")


def test_every_problem_has_its_line(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    (tmp_path / "one.txt").write_text("dog\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "half.csv").write_text("path,split\nnames.txt,.\ngone.jpg,.\n")
    data = {"reader": "folder", "classes": str(tmp_path / "names.txt"), "splits": {"train": "."}}
    problems = found(
        overlay(
            tmp_path,
            run={
                "datasets": ["nowhere", "empty", "one", "half"],
                "encoders": ["absent", "folder"],
                "trainings": ["timm", "file"],
            },
            datasets={
                "nowhere": {**data, "root": str(tmp_path / "nowhere")},
                "empty": {**data, "root": str(tmp_path / "photos")},
                "one": {**data, "root": str(tmp_path), "classes": str(tmp_path / "one.txt")},
                "half": {**data, "reader": "table", "root": str(tmp_path / "half.csv")},
            },
            encoders={
                "absent": {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
                "folder": {"model": "local-dir:nowhere"},
            },
            trainings={
                "timm": {"model": "resnet18", "weights": "timm"},
                "file": {"model": "resnet18", "weights": "nowhere.pt"},
            },
            runtime={"device": "cuda:99"},
        )
    )
    parts = {
        "device": ["cuda:99"],
        "data nowhere": ["no such folder"],
        "data empty": ["no images"],
        "data one": ["one.txt: has one class, 'dog'"],
        "data half": ["1 of 2 image files are missing", "gone.jpg", "max_failed_share (0.05)"],
        "encoder absent": [
            "laion",
            "is not in the cache",
            "a run with network access downloads it",
        ],
        "encoder folder": ["local-dir:nowhere"],
        "training timm": ["resnet18", "network access downloads them", "pretrained=True"],
        "training file": ["nowhere.pt", "no such file"],
    }
    assert [name for name, finding in problems.items() if not finding.ok] == list(parts)
    assert "items with a problem above are not included" in problems["disk"].text
    for name, words in parts.items():
        assert "\n" not in problems[name].text
        assert all(word in problems[name].text for word in words), problems[name].text


@pytest.mark.parametrize("installed", [False, True])
def test_the_text_tower_is_tried(small, tmp_path, monkeypatch, installed):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    encoder = {"model": tiny.make_clip(tmp_path / "clip")}
    file = tmp_path / "clip/open_clip_config.json"
    values = json.loads(file.read_text())
    values["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "example/tokenizer"
    file.write_text(json.dumps(values))
    if installed:
        pytest.importorskip("transformers")
        expected = (
            f"its tokenizer needs tokenizer.json and tokenizer_config.json in {file.parent}; copy "
            "them from the repository example/tokenizer"
        )
    else:
        # As if it were not installed.
        monkeypatch.setitem(sys.modules, "transformers", None)
        expected = "its tokenizer needs the package transformers: pip install transformers"
    options = {"run": {"encoders": ["other"]}, "encoders": {"other": encoder}}
    finding = found(overlay(tmp_path, **options))["encoder other"]
    assert not finding.ok and expected in finding.text


def test_a_text_tower_that_gives_no_numbers(small, tmp_path):
    def broken(network) -> None:
        network.text_projection.data.fill_(float("nan"))

    encoder = {"model": tiny.make_clip(tmp_path / "clip", broken)}
    options = {"run": {"encoders": ["other"]}, "encoders": {"other": encoder}}
    finding = found(overlay(tmp_path, **options))["encoder other"]
    assert not finding.ok and "its vectors are not finite" in finding.text


def test_how_the_models_were_trained_and_what_labels_need(small, tmp_path):
    siglip = {"model": tiny.make_siglip(tmp_path / "siglip")}
    variants = {"by": {"scores": "sigmoid"}, "same": {"standardise": True}}
    wrong = {
        ("tiny-clip", "by"): "labels by: the model has no logit_bias",
        ("siglip", "same"): "labels same: 'standardise' removes each class's mean",
    }
    for name, kind in (("tiny-clip", "softmax"), ("siglip", "sigmoid")):
        for labels in variants:
            file = overlay(
                tmp_path,
                run={"encoders": [name], "labels": [labels]},
                encoders={"siglip": siglip},
                labels=variants,
            )
            finding = found(file)[f"encoder {name}"]
            message = wrong.get((name, labels))
            assert finding.ok == (message is None)
            assert (message or f"trained with a {kind}") in finding.text
            assert finding.values.get("scores") == (None if message else kind)


def test_dense_views_are_tried_and_measured(small, tmp_path):
    attentional = {**tiny.CLIP["vision_cfg"], "attentional_pool": True}
    for name, changes in (("has", {}), ("lacks", {"vision_cfg": attentional})):
        encoder = {"model": tiny.make_clip(tmp_path / name, **changes), "views": "dense"}
        options = {"run": {"encoders": [name]}, "encoders": {name: encoder}}
        findings = found(overlay(tmp_path, **options), seconds=0.2)
        if name == "has":
            assert findings["encoder has"].ok
            assert any("views/s" in finding.text for finding in findings.values())
        else:
            assert not findings["encoder lacks"].ok
            assert "use views: crops" in findings["encoder lacks"].text


def test_weights_that_are_missing_and_those_of_a_file(small, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = Path(tiny.make_clip(tmp_path / "clip").removeprefix("local-dir:"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/doctors-clip.json").write_text(json.dumps(tiny.CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    encoders = {
        "missing": {"model": "ViT-B-32", "pretrained": "openai"},
        "file": {"model": "doctors-clip", "pretrained": str(folder / tiny.WEIGHTS)},
    }
    options = {"run": {"encoders": list(encoders)}, "encoders": encoders}
    findings = found(overlay(tmp_path, **options))
    assert "(of the model ViT-B-32-quickgelu)" in findings["encoder missing"].text
    assert findings["encoder file"].ok
    assert "was taken with mean 0.4815" in findings["encoder file"].text


@pytest.mark.parametrize(
    ("training", "ok", "part"),
    [
        ({"model": "vit_tiny_patch16_224"}, True, "5.5 M parameters"),
        ({"model": "halonet26t"}, False, "set image_size to 256"),
        ({"model": "test_resnet", "model_args": {"in_chans": 1}}, False, "not a classifier of RGB"),
        (
            {"model": "test_resnet", "model_args": {"features_only": True}},
            False,
            "not a classifier",
        ),
    ],
)
def test_an_image_of_the_trainings_size_is_tried(small, tmp_path, training, ok, part):
    training = {"image_size": 96, **training}
    options = {"run": {"trainings": ["other"]}, "trainings": {"other": training}}
    finding = found(overlay(tmp_path, **options))["training other"]
    assert finding.ok == ok and part in finding.text


def test_too_little_room(tmp_path):
    text = message_of(doctor._disk, tmp_path / "not/yet/there", 1e18)
    assert "needs about 1000000000.00 GB" in text and "free some space" in text


def test_the_config_is_read_as_snakemake_reads_it(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    file = overlay(tmp_path, trainings={"aligned": {"epochs": 3}})
    config = read_config([file])
    assert config.trainings["aligned"].epochs == 3
    assert config.trainings["aligned"].learning_rate == 5e-3
    monkeypatch.chdir(tmp_path)
    assert "none.yaml cannot be read" in message_of(read_config, [tmp_path / "none.yaml"])
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "bad.yaml, line 1: not valid YAML" in message_of(read_config, [tmp_path / "bad.yaml"])


def test_config_files_are_given_as_for_snakemake(small, tmp_path):
    """All files follow one --configfile; of two, Snakemake would use only the last."""
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump({"trainings": {"small": {"epochs": "none"}}}))
    done = run("--configfile", small, second, "--seconds", 0)
    assert "trainings.small.epochs" in done.stdout and done.exit_code == 1
    for words in (["--configfile", small, "--configfile", second], [second]):
        with pytest.raises(UserError, match="after one --configfile"):
            CliRunner().invoke(cli.app, ["doctor", *map(str, words)], catch_exceptions=False)


def test_overlays_that_lose_something_are_a_problem(small, tmp_path):
    lower = tmp_path / "lower.yaml"
    demo = yaml.safe_load(Path("config/config.yaml").read_text())["datasets"]["demo"]
    lower.write_text(yaml.safe_dump({"run": {"datasets": ["mine"]}, "datasets": {"mine": demo}}))
    upper = overlay(tmp_path, run={"datasets": ["demo"]})
    finding = next(f for f in examine([lower, upper], seconds=0) if f.check == "config")
    assert not finding.ok and "overlay.yaml replaces 'run' of lower.yaml" in finding.text
