"""Every overlay on a miniature of its data set in the published layout."""

import launcher
import pyarrow.parquet as pq
import pytest
import yaml
from copies import ROOT
from layouts import draw, write_coco, write_nuswide, write_nuswide_formatted, write_voc

from cdul_steps.data.classes import load_classes
from cdul_steps.data.tables import read_facts

OVERLAYS = sorted(p.stem for p in (ROOT / "config").glob("*.yaml") if p.stem != "config")


def names(table):
    return load_classes(ROOT / "config/classes" / table).names


def write_photos(root, truth, classes):
    return [root / image for images in truth.values() for image in images]


# By data set: its place, its writer, its classes, and its truth (None: unknown). The
# one image without a label is left out of COCO.
MINIATURES = {
    "voc2007": (
        "data/VOCdevkit/VOC2007",
        write_voc,
        "voc.yaml",
        {"trainval": {"000005": ["chair"], "000007": []}, "test": {"000001": ["dog", "person"]}},
    ),
    "voc2012": (
        "data/VOCdevkit/VOC2012",
        write_voc,
        "voc.yaml",
        {"train": {"2008_000008": ["horse"]}, "val": {"2008_000002": ["tvmonitor"]}},
    ),
    "coco2014": (
        "data/coco2014",
        write_coco,
        "coco.yaml",
        {
            "train2014": {"57870": ["dining table", "toothbrush"], "384029": []},
            "val2014": {"42": ["hair drier"]},
        },
    ),
    "nuswide": (
        "data/nuswide",
        write_nuswide_formatted,
        "nuswide.yaml",
        {
            "formatted_train": {"actor/0001_21.jpg": ["person", "zebra"]},
            "formatted_val": {"zoo/0002_3.jpg": ["airport"]},
        },
    ),
    "nuswide-official": (
        "data/nuswide",
        write_nuswide,
        "nuswide.yaml",
        {
            "Train": {"actor/0001_21.jpg": ["person"], "zoo/0003_4.jpg": []},
            "Test": {"zoo/0002_3.jpg": []},
        },
    ),
    "photos": ("photos", write_photos, "photos.txt", {".": {"holiday/a.jpg": None}}),
}


def overlay(project, name):
    """The overlay, except for the number of images."""
    config = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    for dataset in config["datasets"].values():
        dataset["expected_images"] = None
    project.config = config
    return project


def lay_out(project, dataset):
    """Write the miniature of a data set where its overlay expects it."""
    place, write, classes, truth = MINIATURES[dataset]
    for path in write(project.folder / place, truth, names(classes)):
        draw(path)
    return truth, names(classes)


def test_every_overlay_has_a_miniature():
    sets = {
        dataset
        for name in OVERLAYS
        for dataset in yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())["datasets"]
    }
    assert sets == set(MINIATURES)


@pytest.mark.parametrize("dataset", MINIATURES)
def test_manifest_runs_and_the_rest_is_planned(project, dataset):
    project = overlay(project, dataset.removesuffix("-official"))
    truth, classes = lay_out(project, dataset)
    words = ["--config", f"run={{datasets: [{dataset}]}}"] if "official" in dataset else []
    images = project.results / dataset / "manifest/images.parquet"
    project.snakemake(str(images.relative_to(project.folder)), *words)
    assert read_facts(images)["classes"] == list(classes)
    splits = project.config["datasets"][dataset]["splits"]
    table = pq.read_table(images).to_pylist()
    assert {row["width"] for row in table} == {24}
    for split, own in splits.items():
        found = [
            {classes[c] for c in row["positive"]} if row["known"] else None
            for row in table
            if row["split"] == split
        ]
        assert found == [
            None if shown is None else set(shown)
            for shown in truth[own].values()
            if shown or dataset != "coco2014"
        ]
    count = len(splits)
    expected = {
        "store": count,
        "encode": count,
        "encode_text": 1,
        "similarity": count,
        "label": 1,
        "quality": 1,
        "train": 1,
        "predict": count,
        "evaluate": 1,
        "model_card": 1,
    }
    if dataset == "photos":
        # A frozen trunk, and second views, for which a first classifier is trained.
        expected |= {"feature_store": count, "features": count, "join_labels": 1}
        expected |= {"box_images": 1, "boxes": 1}
        for stage in ("store", "encode_text", "encode", "similarity", "label", "train"):
            expected[stage] += 1
    assert project.plan(*words) == expected


def test_half_a_set_ends_the_run_before_it_starts(project):
    lay_out(overlay(project, "coco2014"), "coco2014")
    whole = project.set("datasets.coco2014.expected_images", {"train": 82081})
    done = whole.snakemake("-n", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    (line,) = [x for x in done.stdout.splitlines() if "cdul: error:" in x]
    assert "split 'train' has 1 images, not 82081" in line and "expected_images: null" in line


def test_two_overlays_at_once(project):
    """Both sets are made with their own settings; without a list under `run`, one line says so."""
    for name in ("voc2007", "coco2014"):
        lay_out(overlay(project, name), name)
        (project.folder / f"{name}.yaml").write_text(yaml.safe_dump(project.config))
    runs = [
        {"datasets": [name], "encoders": ["rn50x64"], "labels": ["paper"], "trainings": [name]}
        for name in ("voc2007", "coco2014")
    ]
    (project.folder / "both.yaml").write_text(yaml.safe_dump({"run": runs}))

    def plan(*files: str) -> str:
        words = ["-n", "-p", "--configfile", *files]
        return launcher.run_snakemake(project.folder, project.environment, *words).stdout

    text = plan("voc2007.yaml", "coco2014.yaml", "both.yaml")
    assert "replaces" not in text
    for name, size in (("voc2007", 8), ("coco2014", 16)):
        (train,) = [x for x in text.splitlines() if "cdul train" in x and f"/paper/{name}" in x]
        assert f'"batch_size":{size}' in train.replace("\\", "")
    text = plan("voc2007.yaml", "coco2014.yaml")
    assert "cdul: coco2014.yaml replaces 'run' of voc2007.yaml" in text
