"""The embedded demo, cut small: what a run leaves behind, and what re-runs when."""

import json
import os
import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import zarr

ENCODE_JOBS = 3 + 1
AFTER_LABELS = {"label": 1, "quality": 1, "train": 1, "predict": 2, "evaluate": 1}


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
    assert not (training / "checkpoint.pt").exists()


def test_every_job_has_a_log(demo):
    logs = {
        p.parent.relative_to(demo.results / "logs").parts[0] for p in demo.results.rglob("*.log")
    }
    assert {"scenes", "manifest", "encode", "encode_text", "label", "train", "predict"} <= logs


def test_summary(demo):
    command = [sys.executable, "-m", "cdul_steps.cli", "summary", str(demo.results)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "CLIP, final" in text and "classifier, small" in text


def test_second_run_does_nothing(demo):
    assert demo.plan() == {}
    assert "Nothing to be done" in demo.snakemake().stdout


def test_zeta_reruns_labels_only(demo):
    assert demo.set("labels.final.zeta", 0.1).plan() == AFTER_LABELS


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


def test_precision_reruns_every_encode(demo):
    jobs = demo.set("encoders.tiny-clip.precision", "bf16").plan()
    assert jobs["encode"] == ENCODE_JOBS and "encode_text" not in jobs


def test_training_setting_reruns_train_only(demo):
    jobs = demo.set("trainings.small.learning_rate", 0.01).plan()
    assert jobs == {"train": 1, "predict": 2, "evaluate": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 3), ("workers", 0), ("device", "cpu")],
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


SLURM = ["--profile", "profiles/slurm", "--workflow-profile"]


@pytest.mark.parametrize("profile", ["profiles/slurm", "profiles/slurm-gres"])
def test_profiles_rerun_nothing(demo, profile):
    assert demo.plan(*SLURM, profile) == {}


def test_profile_for_gres(demo):
    asked = resources(demo, "train", *SLURM, "profiles/slurm-gres")
    wanted = {"gpu": "0", "gres": "gpu:1", "device": "cuda", "runtime": "720", "mem_mb": "32000"}
    assert {name: asked[name] for name in wanted} == wanted
    assert "gres" not in resources(demo, "label", *SLURM, "profiles/slurm-gres")
