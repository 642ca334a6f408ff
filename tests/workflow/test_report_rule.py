"""The report as a target, and in Snakemake's own report."""

import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path


class Loaded(HTMLParser):
    """The addresses that a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        wanted = {"src"} | ({"href"} if tag == "link" else set())
        self.sources += [value for key, value in attrs if key in wanted and value]


def loaded(path) -> list[str]:
    parser = Loaded()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.sources


def test_report(demo):
    assert demo.plan("report") == {"report": 1}
    demo.snakemake("report")
    folder = demo.results / "report"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Classifier: demo / tiny-clip / final / small" in page
    assert {p.name for p in (folder / "demo/tiny-clip/final/small").iterdir()} == {
        "average_precision.svg",
        "class_maps.jpg",
        "cooccurrence.svg",
        "learning.svg",
        "precision_recall.svg",
    }
    assert all(source.startswith("data:") for source in loaded(folder / "report.html"))
    # The stages' time and memory, from Snakemake's benchmarks.
    costs = page.partition("Time, speed and memory</h2>")[2].partition("</section>")[0]
    stages = ["scenes", "manifest", "encode_text", "store", "encode", "similarity", "label"]
    for stage in [*stages, "quality", "train", "predict", "evaluate"]:
        assert f"<td>{stage}</td>" in costs
    assert demo.plan("report") == {} and demo.plan() == {}

    own = demo.folder / "snakemake.html"
    demo.snakemake("report", "--report", own.name)
    assert not [s for s in loaded(own) if s.startswith(("http:", "https:", "//"))]
    assert own.stat().st_size > (folder / "report.html").stat().st_size
    assert "The image regions behind the classifier" in own.read_text()


def test_snakemakes_own_report_holds_results(demo):
    """Also for a run that never made the target `report`."""
    archive = demo.folder / "report.zip"
    demo.snakemake("--report", archive.name)
    with zipfile.ZipFile(archive) as report:
        held = {Path(name).name for name in report.namelist()}
    assert {"metrics.json", "quality.json", "README.md"} <= held


def test_lost_benchmarks_rerun_nothing(demo):
    shutil.move(demo.results / "benchmarks", demo.folder / "kept")
    try:
        assert demo.plan() == {}
    finally:
        shutil.move(demo.folder / "kept", demo.results / "benchmarks")


def test_a_new_caption_makes_the_report_anew(demo):
    demo.snakemake("report")
    path = demo.folder / "cdul_steps/report/captions.py"
    text = path.read_text()
    try:
        path.write_text(text.replace("Learning curves", "Curves of learning"))
        assert demo.plan("report") == {"report": 1} and demo.plan() == {}
    finally:
        path.write_text(text)
