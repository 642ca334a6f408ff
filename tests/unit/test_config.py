import copy
import json
from pathlib import Path

import pytest
import yaml

from cdul_steps.config import (
    Config,
    Dataset,
    Sweep,
    Training,
    check_syntax,
    clashes,
    load,
    read_sweep,
    read_training,
    reference,
    schema,
)
from cdul_steps.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
OVERLAYS = sorted(p.name for p in (ROOT / "config").glob("*.yaml") if p.name != "config.yaml")


def laid_over(base, overlay):
    """Merge config files as Snakemake does: mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = laid_over(base[key], value) if both else value
    return merged


def changed(place, value):
    """The base config with the value of a dotted key changed or added."""
    values = copy.deepcopy(BASE)
    *parents, last = place.split("/")
    section = values
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return values


def message_of(values, function=load):
    with pytest.raises(UserError) as caught:
        function(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


COUNTS = {
    "voc2007": {"train": 5011, "test": 4952},
    "voc2012": {"train": 5717, "test": 5823},
    "coco2014": {"train": 82081, "test": 40137},
    "nuswide": {"train": 150000, "test": 60260},
    "nuswide-official": {"train": 161789, "test": 107859},
}
"""The numbers of images in the papers on these data sets."""


def test_the_base_config_loads():
    config = load(BASE)
    assert {made.dataset for made in config.made} == {"demo"}
    assert config.trainings["aligned"].alignment.enabled
    assert not config.trainings["fixed"].alignment.enabled


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_loads_over_the_base(name):
    overlay = yaml.safe_load((ROOT / "config" / name).read_text(encoding="utf-8"))
    config = load(laid_over(BASE, overlay))
    for dataset in config.datasets.values():
        assert dataset.reader == "demo" or dataset.root
    (made,) = config.made
    assert made.training == made.dataset == name.removesuffix(".yaml")
    if made.labels == "paper":
        clip, labels = config.encoders[made.encoder], config.labels["paper"]
        training = config.trainings[made.training]
        assert config.ablation.training == made.training
        assert (clip.model, clip.pretrained, clip.aliases) == ("RN50x64", "openai", False)
        assert (labels.construction, labels.zeta, labels.lambda_) == ("final", 0.5, 0)
        assert (training.model, training.weights, training.image_size) == ("resnet101", "timm", 448)
        assert (training.epochs, training.learning_rate) == (20, 1e-5)
        assert training.batch_size == (8 if name.startswith("voc") else 16)
        for key in config.datasets.keys() - {"demo"}:
            dataset = config.datasets[key]
            assert set(dataset.splits) == {"train", "test"}
            assert dataset.expected_images == COUNTS[key]


@pytest.mark.parametrize("name", ["config.yaml", *OVERLAYS])
def test_every_training_with_alignment_moves_its_labels(name):
    overlay = yaml.safe_load((ROOT / "config" / name).read_text(encoding="utf-8"))
    config = load(laid_over(BASE, overlay))
    for training in (config.trainings[made.training] for made in config.made):
        assert not training.alignment.enabled or training.alignment.warmup < training.epochs


@pytest.mark.parametrize(
    ("place", "unknown", "nearest"),
    [
        ("trainnings", "trainnings", "trainings"),
        ("run/dataset", "run.dataset", "datasets"),
        ("evaluate/dificult", "evaluate.dificult", "difficult"),
        ("runtime/batchsize", "runtime.batchsize", "batch_size"),
        ("datasets/demo/shardsize", "datasets.demo.shardsize", "shard_size"),
        ("datasets/demo/scenes/sed", "datasets.demo.scenes.sed", "seed"),
        ("encoders/tiny-clip/template", "encoders.tiny-clip.template", "templates"),
        ("labels/final/lamda", "labels.final.lamda", "lambda"),
        ("labels/final/harden/top-k", "labels.final.harden.top-k", "top_k"),
        ("sweep/construction", "sweep.construction", "constructions"),
        ("trainings/fixed/epoch", "trainings.fixed.epoch", "epochs"),
        ("trainings/aligned/alignment/stepsize", "aligned.alignment.stepsize", "step_size"),
        ("trainings/aligned/smoothing/negativ", "aligned.smoothing.negativ", "negative"),
        ("ablation/seed", "ablation.seed", "seeds"),
    ],
)
def test_an_unknown_key_names_the_nearest(place, unknown, nearest):
    message = message_of(changed(place, 1))
    assert f"{unknown}'" in message
    assert message.endswith(f"did you mean '{nearest}'?")


def test_a_key_like_no_other_lists_those_there_are():
    assert message_of(changed("evaluate/zzz", 1)).endswith("known: ap, difficult")


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "0.00001", 1e-5])
def test_numbers_without_a_point(text):
    assert yaml.safe_load("lr: 1e-5")["lr"] == "1e-5"
    config = load(changed("trainings/aligned/learning_rate", text))
    assert config.trainings["aligned"].learning_rate == 1e-5


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trainings/aligned/learning_rate", "fast"),
        ("trainings/aligned/learning_rate", -1),
        ("trainings/aligned/epochs", 0),
        ("trainings/aligned/loss", "mse"),
        ("trainings/aligned/alignment/sigma", 0),
        ("trainings/aligned/positives", "top2"),
        ("trainings/aligned/expected_positives", 0),
        ("ablation/seeds", []),
        ("labels/final/zeta", 1.5),
        ("labels/final/lambda", 2),
        ("labels/final/tau", 0),
        ("labels/final/construction", "local_min"),
        ("datasets/demo/grid", [3]),
        ("datasets/demo/grid", [0, 3]),
        ("datasets/demo/grid", []),
        ("datasets/demo/grid", [[3, 3], [2, 9]]),
        ("datasets/demo/overlap", 1),
        ("labels/final/grid", [[3, 3]]),
        ("labels/final/positives", 0),
        ("labels/final/harden/threshold", 0),
        ("labels/final/harden/top_k", 0),
        ("sweep/tau", [1, 0]),
        ("sweep/constructions", ["local_min"]),
        ("datasets/demo/max_failed_share", "nan"),
        ("datasets/demo/splits", {"val": "val"}),
        ("datasets/demo/expected_images", {"train": 0}),
        ("datasets/demo/expected_images", {"val": 3}),
        ("datasets/demo/labelled_only", "perhaps"),
        ("datasets/demo/reader", "imagenet"),
        ("encoders/tiny-clip/templates", []),
        ("encoders/tiny-clip/templates", ["a photo"]),
        ("encoders/tiny-clip/precision", "fp8"),
        ("run/datasets", []),
        ("run/datasets", "demo"),
        ("evaluate/difficult", "maybe"),
        ("datasets", None),
    ],
)
def test_a_wrong_value_is_named(place, value):
    message = message_of(changed(place, value))
    for key in place.split("/"):
        assert key in message


@pytest.mark.parametrize("place", ["datasets/demo/classes", "encoders/tiny-clip/model"])
def test_a_missing_key_is_named(place):
    values = copy.deepcopy(BASE)
    kind, name, key = place.split("/")
    del values[kind][name][key]
    assert message_of(values) == f"config: '{kind}.{name}.{key}' is missing"


@pytest.mark.parametrize("kind", ["datasets", "encoders", "labels", "trainings"])
def test_a_run_of_an_unknown_section(kind):
    existing = BASE["run"][kind][0]
    message = message_of(changed(f"run/{kind}", [existing + "x"]))
    assert message.startswith(f"config: run.{kind} names '{existing}x'")
    assert message.endswith(f"did you mean '{existing}'?")


@pytest.mark.parametrize("kind", ["datasets", "encoders", "labels", "trainings"])
@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "-a", ".hidden", "{split}", "naïve"])
def test_a_name_that_cannot_be_a_folder(kind, name):
    values = changed(f"{kind}/x", next(iter(BASE[kind].values())))
    values[kind][name] = values[kind].pop("x")
    assert "is not a usable name" in message_of(values)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("datasets", "logs"),
        ("datasets", "report"),
        ("encoders", "manifest"),
        ("encoders", "scenes"),
        ("labels", "ablation"),
        ("labels", "embeddings"),
        ("labels", "encode"),
        ("labels", "similarity"),
        ("labels", "sweep"),
        ("trainings", "ablation"),
    ],
)
def test_a_name_of_a_folder_of_results_is_taken(kind, name):
    message = message_of(changed(f"{kind}/{name}", next(iter(BASE[kind].values()))))
    assert f"'{name}' under '{kind}'" in message


def test_roots():
    assert "does not use 'root'" in message_of(changed("datasets/demo/root", "/data"))
    assert "needs a 'root'" in message_of(changed("datasets/demo/reader", "folder"))
    assert "'train' is missing" in message_of(changed("datasets/demo/splits", {"test": "test"}))


def test_one_grid_or_several():
    assert load(BASE).datasets["demo"].grid == [(3, 3)]
    assert load(changed("datasets/demo/grid", [2, 4])).datasets["demo"].grid == [(2, 4)]
    several = load(changed("datasets/demo/grid", [[2, 2], [3, 3]]))
    assert several.datasets["demo"].grid == [(2, 2), (3, 3)]
    assert Dataset(reader="demo", classes="x").grid == [(3, 3)]


def test_labels_of_a_grid_that_the_data_set_has_not():
    assert load(changed("labels/calibrated/grid", [3, 3])).labels["calibrated"].grid == (3, 3)
    message = message_of(changed("labels/calibrated/grid", [2, 2]))
    assert message.startswith("config: labels.calibrated.grid is [2, 2], and")
    assert message.endswith("datasets.demo.grid has only [3, 3]")


def test_hard_labels_are_made_in_one_way():
    message = message_of(changed("labels/final/harden", {"threshold": 0.5, "top_k": 1}))
    assert message == "config: labels.final.harden: give 'threshold' or 'top_k', not both"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nroot photos\nb: 2\n", 2),
        ("a:\n  b: 1\n   c: 2\n", 3),
        ("a: [1,\nb: 2\n", 1),
        ("a: 1\n\tb: 2\n", 2),
    ],
)
def test_a_mistake_of_syntax_has_its_line(tmp_path, text, line):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert message_of(file, check_syntax).startswith(f"{file}, line {line}: not valid YAML: ")


def test_json_is_a_config_too(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{\n\t"a": 1\n}')
    check_syntax(file)


def test_dense_views_have_one_way_of_resizing():
    dense = changed("encoders/tiny-clip/views", "dense")
    encoder = dense["encoders"]["tiny-clip"]
    load(dense)
    encoder["resize_mode"] = "shortest"
    assert message_of(dense) == (
        "config: encoders.tiny-clip: dense views squash the image; remove 'resize_mode'"
    )


def test_sweep_settings():
    assert read_sweep("{}") == Sweep()
    assert read_sweep('{"lambda": [0.5]}').lambda_ == [0.5]
    assert "did you mean 'tau'?" in message_of('{"taus": [1]}', read_sweep)
    assert read_sweep(Sweep(zeta=[0]).model_dump_json(by_alias=True)) == Sweep(zeta=[0])


@pytest.mark.parametrize("loss", ["wan", "epr", "role"])
@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "'positives: top1'"),
        ({"positives": "top1"}, "'alignment: {enabled: false}'"),
        ({"alignment": {"enabled": False}}, "'positives: top1'"),
    ],
)
def test_single_positive_losses_need_hard_positives_that_stay(loss, settings, remedy):
    message = message_of(changed("trainings/x", {"loss": loss, **settings}))
    assert message.startswith(f"config: trainings.x: loss '{loss}'")
    assert message.endswith(f"set {remedy}")
    right = {"loss": loss, "positives": "threshold", "alignment": {"enabled": False}}
    assert load(changed("trainings/x", right)).trainings["x"].loss == loss


def test_training_settings_from_json_and_from_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 3\nlearning_rate: 1e-4\nalignment: {sigma: 0.1}\n")
    expected = Training(epochs=3, learning_rate=1e-4, alignment={"sigma": 0.1})
    assert read_training(str(path)) == expected
    text = '{"epochs": 3, "learning_rate": 1e-4, "alignment": {"sigma": 0.1}}'
    assert read_training(text) == expected
    assert read_training("{}") == Training()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"epoch": 3}', "did you mean 'epochs'?"),
        ('{"epochs": 3', "not readable"),
        ("none.yaml", "neither JSON nor a file"),
    ],
)
def test_mistakes_in_training_settings(text, part):
    assert part in message_of(text, read_training)


def test_settings_survive_the_way_through_json():
    training = load(BASE).trainings["aligned"]
    assert read_training(training.model_dump_json()) == training


@pytest.mark.parametrize(
    ("file", "written", "command"),
    [
        ("config/README.md", reference, "config-reference"),
        ("workflow/schemas/config.schema.json", schema, "config-schema"),
    ],
)
def test_generated_files_are_up_to_date(file, written, command):
    path = ROOT / file
    current = path.read_text(encoding="utf-8") if path.is_file() else ""
    assert current == written(), f"run: python -m cdul_steps.cli {command} > {file}"


def test_every_key_is_described():
    definitions = [Config.model_json_schema(), *Config.model_json_schema()["$defs"].values()]
    for definition in definitions:
        assert definition["additionalProperties"] is False
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{definition['title']}.{key}"
            assert f"| `{key}` |" in reference()


def test_the_schema_is_json():
    assert json.loads(schema())["title"] == "Config"


# Several data sets at once


def overlays(*names):
    return [(n, yaml.safe_load((ROOT / "config" / n).read_text(encoding="utf-8"))) for n in names]


BOTH = ["voc2007.yaml", "coco2014.yaml"]
TWO_RUNS = {
    "run": [
        {"datasets": [n], "encoders": ["rn50x64"], "labels": ["calibrated"], "trainings": [n]}
        for n in ("voc2007", "coco2014")
    ]
}


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]])
def test_two_overlays_keep_what_each_says(order):
    values = BASE
    for _, overlay in [*overlays(*order), ("runs.yaml", TWO_RUNS)]:
        values = laid_over(values, overlay)
    config = load(values)
    assert {(made.dataset, made.training) for made in config.made} == {
        ("voc2007", "voc2007"),
        ("coco2014", "coco2014"),
    }
    assert config.trainings["voc2007"].batch_size == 8
    assert config.trainings["coco2014"].batch_size == 16
    calibrated = config.labels["calibrated"]
    assert calibrated.of("voc2007").positives == 1.5
    assert calibrated.of("coco2014").positives == 2.9
    assert config.ablated.datasets == [order[1].removesuffix(".yaml")]


def test_what_overlays_of_two_data_sets_lose_is_told():
    (line,) = clashes(overlays(*BOTH))
    assert line.startswith("coco2014.yaml replaces 'run' of voc2007.yaml")
    assert clashes([*overlays(*BOTH), ("runs.yaml", TWO_RUNS)]) == []
    mine = {"run": {"datasets": ["mine"]}, "trainings": {"voc2007": {"batch_size": 9}}}
    lines = clashes([*overlays("voc2007.yaml"), ("mine.yaml", mine)])
    assert "mine.yaml changes trainings.voc2007 of voc2007.yaml" in lines[1] and len(lines) == 2


@pytest.mark.parametrize(
    "over",
    [
        {"trainings": {"voc2007": {"epochs": 3}}},
        {"run": {"labels": ["calibrated"]}},
        {"run": {"datasets": ["voc2007"]}, "trainings": {"voc2007": {"epochs": 3}}},
    ],
)
def test_an_overlay_that_changes_one_beneath_loses_nothing(over):
    assert clashes([*overlays("voc2007.yaml"), ("mine.yaml", over)]) == []


def test_a_list_of_runs_makes_each_once():
    run = {"datasets": ["demo"], "encoders": ["tiny-clip"], "labels": ["final"]}
    runs = [{**run, "trainings": ["aligned", "fixed"]}, {**run, "trainings": ["fixed"]}]
    made = load(laid_over(BASE, {"run": runs})).made
    assert [of.training for of in made] == ["aligned", "fixed"]
    wrong = laid_over(BASE, {"run": [run, {**run, "trainings": ["fixd"]}]})
    assert "run.trainings names 'fixd'" in message_of(wrong)
