"""The embedded demo with ten of its epochs: the method's claims hold."""

import json

import pyarrow.parquet as pq


def test_the_default_config_shows_the_claims(project):
    project.config = {"trainings": {"aligned": {"epochs": 10, "alignment": {"warmup": 7}}}}
    done = project.snakemake()
    assert "Nothing to be done" not in done.stdout
    results = project.results / "demo/tiny-clip/calibrated"
    quality = json.loads((results / "quality.json").read_text())["splits"]
    for split, images in (("train", 2000), ("test", 500)):
        assert quality[split]["final"]["images"] == images
        # Snippets help: the aggregated labels beat those of the whole image.
        assert quality[split]["final"]["mAP"] >= quality[split]["global"]["mAP"] + 10
    history = pq.read_table(results / "aligned/history.parquet").to_pandas()
    # Gradient alignment improves the labels.
    assert history.label_mAP.iloc[-1] > history.label_mAP.iloc[0] + 1
    metrics = json.loads((results / "aligned/metrics.json").read_text())
    # The classifier, which never used CLIP, is far better than the scores of whole images.
    assert metrics["mAP"] >= quality["test"]["global"]["mAP"] + 20
    assert project.plan() == {}
