"""A reduced demo: its outputs, and what re-runs when."""

import base64
import json
import os
import re
import subprocess

import launcher
import pyarrow.parquet as pq
import pytest
import zarr

ENCODE_JOBS = 3 + 1
AFTER_TRAIN = {"predict": 2, "evaluate": 1, "model_card": 1}
AFTER_LABELS = {"label": 1, "quality": 1, "train": 1, **AFTER_TRAIN}


def test_outputs(demo):
    images = pq.read_table(demo.results / "demo/manifest/images.parquet").to_pandas()
    assert images.split.value_counts().to_dict() == {"train": 50, "test": 20}
    encoder = demo.results / "demo/tiny-clip"
    embeddings = zarr.open_array(encoder / "embeddings/train.zarr", mode="r")
    similarity = zarr.open_array(encoder / "similarity/train.zarr", mode="r")
    assert embeddings.shape[:2] == similarity.shape[:2] == (50, 10)
    classes = similarity.attrs["classes"]
    assert embeddings.dtype == "float16" and similarity.shape[2] == len(classes)
    labels = pq.read_table(encoder / "final/pseudo_labels.parquet")
    assert labels.column_names == ["image_id", "path", *classes] and len(labels) == 50
    training = encoder / "final/small"
    history = pq.read_table(training / "history.parquet").to_pandas()
    assert history.epoch.tolist() == [1, 2] and (history.label_movement > 0).all()
    predictions = pq.read_table(training / "predictions/test.parquet")
    assert predictions.column_names == ["image_id", "path", *classes, "labels", "status"]
    metrics = json.loads((training / "metrics.json").read_text())
    assert metrics["images"] == 20 and 0 < metrics["mAP"] <= 100
    card = (training / "model/README.md").read_text()
    assert f"mAP {metrics['mAP']:.2f} on 20 images" in card and "50 of demo" in card
    assert not (training / "checkpoint.pt").exists()


def test_every_job_has_a_log(demo):
    logs = {p.relative_to(demo.results / "logs").parts[0] for p in demo.results.rglob("*.log")}
    assert {"scenes", "manifest", "encode", "encode_text", "label", "train", "predict"} <= logs


def test_summary(demo):
    command = [launcher.commands() / "cdul", "summary", str(demo.results)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "CLIP, final" in text and "classifier, small" in text


def test_a_gallery_is_made_when_asked_for(demo):
    gallery = "results/demo/tiny-clip/final/small/gallery/test"
    assert demo.plan(gallery) == {"gallery": 1}
    demo.snakemake(gallery)
    assert (demo.folder / gallery / "index.html").is_file()
    assert len(list((demo.folder / gallery / "thumbnails").iterdir())) == 20
    assert demo.plan(gallery) == {}
    page = demo.folder / "cdul_steps/shared/shared.css"
    text = page.read_text()
    try:
        page.write_text(text + "\n")
        assert demo.plan(gallery) == {"gallery": 1}
    finally:
        page.write_text(text)


def test_second_run_does_nothing(demo):
    assert demo.plan() == {}
    assert "Nothing to be done" in demo.snakemake().stdout


def test_zeta_reruns_labels_only(demo):
    assert demo.set("labels.final.zeta", 0.1).plan() == AFTER_LABELS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("standardise", True),
        ("positives", 2),
        ("harden", {"top_k": 1}),
        ("grid", [3, 3]),
        ("construction", "local_max"),
    ],
)
def test_label_settings_rerun_labels_only(demo, key, value):
    assert demo.set(f"labels.final.{key}", value).plan() == AFTER_LABELS


def test_label_variants_share_one_encoding(demo):
    variants = {
        "hard": {"harden": {"threshold": 0.5}},
        "rescaled": {"tau": 0.2, "positives": 2.8, "standardise": True},
        "cells": {"grid": [3, 3], "construction": "local_mean"},
    }
    project = demo.set("run.labels", list(variants)).set("labels", variants)
    assert project.plan() == {rule: 3 * jobs for rule, jobs in AFTER_LABELS.items()}


@pytest.mark.parametrize(("key", "value"), [("grid", [[2, 2], [3, 3]]), ("overlap", 0.25)])
def test_other_snippets_make_the_manifest_anew(demo, key, value):
    # The rest is planned once the new manifest lists the shards.
    assert demo.set(f"datasets.demo.{key}", value).plan()["manifest"] == 1


def test_labels_of_two_grids_from_one_encoding(project):
    variants = {
        "coarse": {"grid": [2, 2]},
        "fine": {"grid": [3, 3]},
        "both": {"positives": 2, "harden": {"top_k": 1}},
    }
    project.config = {
        "datasets": {
            "demo": {
                "grid": [[2, 2], [3, 3]],
                "overlap": 0.2,
                "scenes": {"train": 12, "test": 5},
            }
        },
        "labels": variants,
        "run": {"labels": list(variants)},
    }
    encoder = project.results / "demo/tiny-clip"
    made = [f"results/demo/tiny-clip/{name}/quality.json" for name in variants]
    done = project.snakemake(*made)
    assert done.stdout.count("rule encode:") == 2  # one shard per split
    assert zarr.open_array(encoder / "embeddings/train.zarr", mode="r").shape[:2] == (12, 14)
    quality = {
        name: json.loads((encoder / name / "quality.json").read_text())["splits"]["test"]
        for name in variants
    }
    assert len({values["local_mean"]["mAP"] for values in quality.values()}) == 3
    assert len({values["global"]["mAP"] for values in quality.values()}) == 1
    assert "pseudo_labels" in quality["both"] and "pseudo_labels" not in quality["fine"]
    table = pq.read_table(encoder / "both/pseudo_labels.parquet").to_pandas()
    assert (table.iloc[:, 2:].sum(axis=1) == 1).all()
    assert project.plan(*made) == {}


def test_sweep(demo):
    project = demo.set("sweep", {"tau": [1, 2], "zeta": [0.3], "lambda": [0]})
    assert project.plan("sweep") == {"sweep": 1, "sweep_labels": 1}
    project.snakemake("sweep")
    folder = demo.results / "demo/tiny-clip/sweep"
    rows = pq.read_table(folder / "sweep.parquet").to_pandas()
    assert rows.groupby("split").size().to_dict() == {"train": 2 * 2 * 5, "test": 2 * 2 * 5}
    assert (folder / "sweep.svg").stat().st_size
    quality = json.loads((demo.results / "demo/tiny-clip/final/quality.json").read_text())
    for split, constructions in quality["splits"].items():
        plain = rows[(rows.split == split) & ~rows.standardise & (rows.tau_multiple == 1)]
        for name, value in zip(plain.construction, plain.mAP, strict=True):
            assert value == pytest.approx(constructions[name]["mAP"])
    assert project.plan("sweep") == {}
    assert project.set("sweep.tau", [1]).plan("sweep") == {"sweep": 1, "sweep_labels": 1}
    assert demo.plan() == {}


def test_prompts_rerun_no_encode(demo):
    jobs = demo.set("encoders.tiny-clip.templates", ["a drawing of a {}"]).plan()
    assert jobs["encode_text"] == 1 and "encode" not in jobs and jobs["train"] == 1


def test_aliases_rerun_no_encode(demo):
    table = demo.folder / "config/classes/demo.yaml"
    text = table.read_text()
    first = text.partition("- ")[2].splitlines()[0]
    try:
        table.write_text(
            text.replace(f"- {first}", f"- {{name: {first}, aliases: [{first}, thing]}}", 1)
        )
        jobs = demo.plan()
    finally:
        table.write_text(text)
    assert jobs["encode_text"] == 1 and "encode" not in jobs and "manifest" not in jobs


def test_encode_has_the_params_of_the_first_release(demo):
    """Snakemake encodes again if these differ from what it recorded with earlier results."""
    name = base64.b64encode(b"results/demo/tiny-clip/encode/train/0.parquet").decode()
    params = json.loads((demo.folder / ".snakemake/metadata" / name).read_text())["params"]
    model, weights = "local-dir:cdul_steps/demo/tiny-clip", "ece52edde6f5c4e38751f20919e8568f"
    recorded = {model, weights, "79d221a7dc04ce0c", "fp32"}
    assert sorted(params) == sorted([*map(repr, recorded), "178956970", "[]", "[]"])


def test_precision_reruns_every_encode(demo):
    jobs = demo.set("encoders.tiny-clip.views", "dense").plan()
    assert jobs == demo.set("encoders.tiny-clip.precision", "bf16").plan()
    assert jobs["encode"] == ENCODE_JOBS and "encode_text" not in jobs


def test_training_setting_reruns_train_only(demo):
    jobs = demo.set("trainings.small.learning_rate", 0.01).plan()
    assert jobs == {"train": 1, **AFTER_TRAIN}


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 3), ("workers", 0), ("device", "cpu"), ("train_devices", 2)],
)
def test_runtime_reruns_nothing(demo, key, value):
    assert demo.set(f"runtime.{key}", value).plan() == {}


def test_cores_rerun_nothing(demo):
    assert demo.plan("--cores", "1") == {}


def _edited(demo, name, old, new):
    """The plan while a source file of the copy is edited."""
    path = demo.folder / "cdul_steps" / name
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new, 1))
        return demo.plan()
    finally:
        path.write_text(text)


def test_editing_aggregation_reruns_labels_not_encode(demo):
    jobs = _edited(demo, "method/aggregation.py", "alpha >= np", "alpha > np")
    assert jobs == AFTER_LABELS


def test_editing_the_encoder_reruns_encode(demo):
    jobs = _edited(demo, "models/encoder.py", "views.float() / 255", "views.float() / 256")
    assert jobs["encode"] == ENCODE_JOBS


def test_editing_a_comment_reruns_nothing(demo):
    assert (
        _edited(demo, "method/aggregation.py", "    alpha, beta", "    # Why.\n    alpha, beta")
        == {}
    )


def test_new_weights_rerun_encode(demo):
    weights = demo.folder / "cdul_steps/demo/tiny-clip/open_clip_model.safetensors"
    content, stat = weights.read_bytes(), weights.stat()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        jobs = demo.plan()
    finally:
        weights.write_bytes(content)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert jobs["encode"] == ENCODE_JOBS and jobs["encode_text"] == 1


def resources(demo, rule, *arguments):
    """The resources of a rule's first job in a plan that begins with encode."""
    text = demo.set("encoders.tiny-clip.precision", "bf16").snakemake("-n", *arguments).stdout
    line = re.search(rf"^\s*rule {rule}:.*?resources: (.*?)$", text, re.M | re.S)[1]
    return dict(entry.split("=", 1) for entry in line.split(", "))


def test_gpu_limit_of_zero_keeps_jobs_off_the_gpu(demo):
    for rule in ("encode", "train", "predict"):
        assert resources(demo, rule)["gpu"] == "1"
        assert resources(demo, rule, "--resources", "gpu=0")["gpu"] == "0"


def test_a_training_asks_for_its_gpus_and_gets_what_there_is(demo):
    several = demo.set("runtime.train_devices", 3)
    for limit, given in (("gpu=4", "3"), ("gpu=2", "2"), ("gpu=0", "0")):
        asked = resources(several, "train", "--resources", limit)
        assert (asked["gpu"], asked["devices"]) == (given, "3")
    assert resources(several, "encode", "--resources", "gpu=4")["gpu"] == "1"


SLURM = ["--profile", "profiles/slurm", "--workflow-profile"]


@pytest.mark.parametrize("profile", ["profiles/slurm", "profiles/slurm-gres"])
def test_profiles_rerun_nothing(demo, profile):
    assert demo.plan(*SLURM, profile) == {}


def test_profile_for_gres(demo):
    asked = resources(demo, "train", *SLURM, "profiles/slurm-gres")
    wanted = {"gpu": "0", "gres": "gpu:1", "device": "cuda", "runtime": "720", "mem_mb": "32000"}
    assert {name: asked[name] for name in wanted} == wanted
    assert "gres" not in resources(demo, "label", *SLURM, "profiles/slurm-gres")
