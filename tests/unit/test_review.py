"""Review: what a tool receives, and that the import returns a person's changes."""

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pyarrow as pa
import pytest
from messages import message_of

from cdul_steps.data.corrections import UNKNOWN, read_corrections
from cdul_steps.data.tables import describe, read_scores, score_table, write_table
from cdul_steps.tools.review import FORMATS, export_review, import_review

CLASSES = ["dog", 'c<a>t & "co', "3"]
SCORES = np.array([[0.9, 0.1, 0.5], [0.2, 0.6, 0.0], [0.1, 0.2, 0.05], [0.3, 1.0, 0.98]])
IDS = ["a", "b", "c d", "e"]
FILES = {
    "csv": "review.csv",
    "label-studio": "tasks.json",
    "coco": "annotations.json",
    "fiftyone": "labels.json",
}
CHANGES = {("a", "dog"): 0.0, ("b", "3"): 1.0, ("e", 'c<a>t & "co'): UNKNOWN}
"""The person's changes: one class removed, one added, and one undecided."""


@pytest.fixture
def labels(tmp_path) -> Path:
    """Labels of four images; an earlier reviewer could not decide the third class of the first."""
    paths = [(tmp_path / f"photos/{name}/same name.jpg").as_posix() for name in IDS]
    table = score_table(pa.array(IDS), pa.array(paths), CLASSES, SCORES.astype(np.float32))
    table = table.append_column("corrected", pa.array([["3"], [], [], []], pa.list_(pa.string())))
    write_table(describe(table, "scores", classes=CLASSES), tmp_path / "labels.parquet")
    sizes = {"image_id": IDS, "width": [40, 30, 20, 10], "height": [4, 3, 2, 1]}
    write_table(pa.table(sizes), tmp_path / "images.parquet")
    return tmp_path / "labels.parquet"


def export(labels: Path, format_: str, **changes) -> Path:
    """The file for the tool in an exported folder."""
    folder = labels.parent / format_
    values = {
        "threshold": 0.5,
        "limit": None,
        "images": labels.parent / "images.parquet",
        "root": None,
        **changes,
    }
    export_review(labels=labels, format_=format_, output=folder, **values)
    return folder / FILES[format_]


def answer(file: Path, **changes) -> dict:
    """The corrections from an edited file."""
    output = file.parent / "corrections.csv"
    values = {"review": file.parent, "confirm": False, "output": output, **changes}
    import_review(file=file, **values)
    return read_corrections(output)


# `CHANGES` as each tool would export them.


def edit_csv(file: Path) -> None:
    rows = list(csv.DictReader(file.open(encoding="utf-8", newline="")))
    assert [row["proposed"] for row in rows[:4]] == ["1", "0", "unknown", "0"]
    assert rows[0]["score"] == "0.9" and {row["value"] for row in rows} == {""}
    for row in rows:
        value = CHANGES.get((row["image_id"], row["class"]))
        row["value"] = "" if value is None else {0.0: "0", 1.0: "1", UNKNOWN: "unknown"}[value]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def edit_label_studio(file: Path) -> None:
    tasks = json.loads(file.read_text())
    for number, task in enumerate(tasks, 1):
        (prediction,) = task.pop("predictions")
        chosen = {r["from_name"]: r["value"]["choices"] for r in prediction["result"]}
        for (image_id, name), value in CHANGES.items():
            if image_id == task["data"]["image_id"]:
                for group, is_in in (("present", value == 1), ("unknown", value == UNKNOWN)):
                    names = [n for n in chosen.get(group, []) if n != name]
                    chosen[group] = [*names, name] if is_in else names
        result = [
            {
                "from_name": group,
                "to_name": "image",
                "type": "choices",
                "value": {"choices": names},
                "origin": "manual",
                "id": "x",
            }
            for group, names in chosen.items()
            if names
        ]
        annotation = {"id": number, "result": result, "was_cancelled": False}
        cancelled = {"id": 9, "result": [], "was_cancelled": True}
        # The third image was never opened, the last one skipped first and opened later.
        given = [] if number == 3 else [annotation, cancelled]
        task |= {"id": number, "annotations": given, "predictions": [], "project": 1}
    file.write_text(json.dumps(tasks))


def edit_coco(file: Path) -> None:
    coco = json.loads(file.read_text())
    images = {image["id"]: image["file_name"] for image in coco["images"]}
    place = {Path(name).parent.name: number for number, name in images.items()}
    category = {c["name"]: c["id"] for c in coco["categories"]}
    for (image_id, name), value in CHANGES.items():
        coco["annotations"] = [
            a
            for a in coco["annotations"]
            if (a["image_id"], a["category_id"]) != (place[image_id], category[name])
        ]
        if value:
            new = {"id": 99, "image_id": place[image_id], "category_id": category[name]}
            if value == UNKNOWN:
                new["attributes"] = {"unknown": True, "occluded": False}
            coco["annotations"].append(new)
    for image in coco["images"]:
        image["file_name"] = image["file_name"].rpartition("photos/")[2]
    file.write_text(json.dumps(coco))


def edit_fiftyone(file: Path) -> None:
    content = json.loads(file.read_text())
    labels = {}
    for path, given in content["labels"].items():
        image_id = Path(path).parent.name
        kept = [x for x in given if (image_id, x["label"]) not in CHANGES]
        for (changed, name), value in CHANGES.items():
            if changed == image_id and value:
                kept.append({"label": name, "attributes": {"unknown": value == UNKNOWN}})
        # Its exporter writes numbers, and null if nothing is left.
        kept = [{**x, "label": CLASSES.index(x["label"])} for x in kept]
        labels[str(Path(path).with_suffix(""))] = kept or None
    file.write_text(json.dumps({**content, "labels": labels}))


EDIT = {
    "csv": edit_csv,
    "label-studio": edit_label_studio,
    "coco": edit_coco,
    "fiftyone": edit_fiftyone,
}


@pytest.mark.parametrize("format_", FORMATS)
def test_what_comes_back_is_what_was_changed(labels, format_):
    file = export(labels, format_)
    EDIT[format_](file)
    assert answer(file) == CHANGES


@pytest.mark.parametrize("format_", ["coco", "fiftyone"])
def test_nothing_changed_is_no_correction(labels, format_):
    assert answer(export(labels, format_)) == {}


def test_tasks_that_nobody_submitted_are_no_correction(labels):
    file = export(labels, "label-studio")
    tasks = [{**task, "annotations": []} for task in json.loads(file.read_text())]
    file.write_text(json.dumps(tasks))
    assert answer(file, confirm=True) == {}


def test_confirmed_images_are_corrected_whole(labels):
    file = export(labels, "label-studio")
    edit_label_studio(file)
    found = answer(file, confirm=True)
    assert {image_id for image_id, _ in found} == {"a", "b", "e"} and len(found) == 9
    assert CHANGES.items() <= found.items()
    assert found["a", "3"] == UNKNOWN and found["b", "dog"] == 0 and found["e", "3"] == 1


def test_a_filled_cell_is_a_correction_even_if_it_was_proposed(labels):
    file = export(labels, "csv")
    file.write_text("image_id,class,value\na,dog,1\n")
    assert answer(file) == {("a", "dog"): 1}


def test_a_second_round_adds_to_the_first(labels):
    file = export(labels, "csv")
    (file.parent / "corrections.csv").write_text("image_id,class,value\na,dog,1\nc d,dog,0\n")
    edit_csv(file)
    assert answer(file) == {**CHANGES, ("c d", "dog"): 0.0}


def test_the_least_decided_images_first(labels):
    file = export(labels, "label-studio", limit=2)
    tasks = json.loads(file.read_text())
    assert [task["data"]["image_id"] for task in tasks] == ["b", "e"]
    (first,), (second,) = (task["predictions"] for task in tasks)
    assert first["score"] == pytest.approx(0.2) and second["score"] == pytest.approx(0.4)
    assert len(read_scores(file.parent / "proposal.parquet")[0]) == 2


def test_label_studio_finds_the_images_and_the_choices(labels):
    root = labels.parent / "photos"
    file = export(labels, "label-studio", root=root)
    for task, name in zip(json.loads(file.read_text()), IDS, strict=True):
        url = urlparse(task["data"]["image"])
        assert url.path == "/data/local-files/"
        assert parse_qs(url.query) == {"d": [f"{name}/same name.jpg"]}
    view = ET.parse(file.parent / "labels.xml").getroot()
    groups = {c.get("name"): [x.get("value") for x in c] for c in view.iter("Choices")}
    assert groups == {"present": CLASSES, "unknown": CLASSES}
    assert {c.get("choice") for c in view.iter("Choices")} == {"multiple"}
    for c in view.iter("Choices"):
        assert c.get("toName") == view.find("Image").get("name")


def test_coco_is_complete(labels):
    coco = json.loads(export(labels, "coco").read_text())
    assert [c["name"] for c in coco["categories"]] == CLASSES
    assert [(i["width"], i["height"]) for i in coco["images"]][:2] == [(40, 4), (30, 3)]
    for number, annotation in enumerate(coco["annotations"], 1):
        image = coco["images"][annotation["image_id"] - 1]
        assert annotation["id"] == number
        assert annotation["bbox"] == [0, 0, image["width"], image["height"]]
        assert annotation["area"] == image["width"] * image["height"]
    assert len(coco["annotations"]) == 5


def test_mistakes_are_one_line(labels, tmp_path):
    file = export(labels, "fiftyone")
    good = json.loads(file.read_text())
    cases = {
        "image 'z' is not in": {"labels": {"z": []}},
        "image 'same name' matches several images in": {"labels": {"same name": []}},
        "class 'owl' of image 'a'": {"labels": {"a": ["owl"]}},
        "not an export of fiftyone (KeyError: 'labels')": {},
        "not an export of fiftyone (ValidationError": [1],
    }
    for part, content in cases.items():
        file.write_text(json.dumps(content))
        assert part in message_of(lambda: answer(file)), part
    file.write_text("{")
    assert "not an export of fiftyone (JSONDecodeError" in message_of(lambda: answer(file))
    file.write_text(json.dumps(good))
    assert "--images" in message_of(lambda: export(labels, "coco", images=None))
    text = message_of(lambda: export(labels, "label-studio", root=tmp_path / "elsewhere"))
    assert "is not below --root" in text
    assert "no such file" in message_of(lambda: answer(file, review=tmp_path))
    assert "not a folder written by" in message_of(lambda: answer(file, review=_foreign(tmp_path)))
    assert "cannot be read" in message_of(lambda: answer(file.with_name("none.json")))


# Other things that tools and people do


def task(image_id: str, *annotations: dict) -> dict:
    return {"data": {"image_id": image_id}, "annotations": list(annotations)}


def annotation(present: list[str], *others: dict, **facts) -> dict:
    value = {"choices": present}
    chosen = {"from_name": "present", "to_name": "image", "type": "choices", "value": value}
    return {"result": [*others, chosen], "was_cancelled": False, **facts}


OTHERS = {
    "comment": {"from_name": "comment", "type": "textarea", "value": {"text": ["blurred"]}},
    "relation": {"type": "relation", "from_id": "x", "to_id": "y", "direction": "right"},
    "further choices": {"from_name": "quality", "type": "choices", "value": {"choices": ["good"]}},
    "rating": {"from_name": "stars", "type": "rating", "value": {"rating": 4}},
    "a box": {"from_name": "box", "type": "rectanglelabels", "value": {"rectanglelabels": ["dog"]}},
    "taxonomy": {"from_name": "tree", "type": "taxonomy", "value": {"taxonomy": [["dog"]]}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_controls_of_label_studio_are_left_out_and_told(labels, other, capsys):
    file = export(labels, "label-studio")
    file.write_text(json.dumps([task("b", annotation(['c<a>t & "co', "dog"], OTHERS[other]))]))
    assert answer(file) == {("b", "dog"): 1}
    name = OTHERS[other].get("from_name", "relation")
    assert f"left out results of other controls: {name} (1)" in capsys.readouterr().err


def test_a_renamed_control_is_not_taken_for_an_empty_answer(labels):
    file = export(labels, "label-studio")
    renamed = annotation(["dog"])
    renamed["result"][0]["from_name"] = "choice"
    file.write_text(json.dumps([task("b", renamed)]))
    assert "no results of the controls present and unknown, only of choice (1)" in message_of(
        lambda: answer(file)
    )


def test_people_who_differ(labels, capsys):
    file = export(labels, "label-studio")
    both = [annotation(["dog", "3"], completed_by=1), annotation(["3"], completed_by=2)]
    file.write_text(json.dumps([task("b", *both)]))
    assert answer(file) == {("b", "3"): 1, ("b", "dog"): UNKNOWN, ("b", 'c<a>t & "co'): 0}
    assert "entries with conflicting answers, now set to unknown: 1" in capsys.readouterr().err
    # The order of their answers does not matter.
    file.write_text(json.dumps([task("b", *both[::-1])]))
    (file.parent / "corrections.csv").unlink()
    assert answer(file)["b", "dog"] == UNKNOWN


def test_a_person_who_thinks_again(labels):
    file = export(labels, "label-studio")
    first = annotation(["dog"], completed_by=1, updated_at="2024-01-02T00:00:00Z")
    second = annotation(["3"], completed_by=1, updated_at="2024-01-03T00:00:00Z")
    file.write_text(json.dumps([task("b", second, first)]))
    assert answer(file) == {("b", "3"): 1, ("b", 'c<a>t & "co'): 0}


@pytest.mark.parametrize("given", [0, [0], "dog", ["dog"], {"label": "dog"}, [{"label": 0}]])
def test_a_single_label_of_fiftyone(labels, given):
    file = export(labels, "fiftyone")
    path = next(p for p in json.loads(file.read_text())["labels"] if "/b/" in p)
    file.write_text(json.dumps({"classes": CLASSES, "labels": {path: given}}))
    assert answer(file) == {("b", "dog"): 1, ("b", 'c<a>t & "co'): 0}


@pytest.mark.parametrize("given", [-1, 3, 1.5, True, [None], [[]]])
def test_a_label_of_fiftyone_that_is_none(labels, given):
    file = export(labels, "fiftyone")
    path = next(iter(json.loads(file.read_text())["labels"]))
    file.write_text(json.dumps({"classes": CLASSES, "labels": {path: given}}))
    assert "a label is " in message_of(lambda: answer(file))
    assert not (file.parent / "corrections.csv").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c["annotations"][0].update(category_id=77), "for category 77, which the"),
        (lambda c: c["annotations"][0].update(image_id=99), "for image 99, which the"),
        (lambda c: c["categories"][0].update(id=2), "two categories have the same id 2"),
        (lambda c: c["images"][0].update(id=2), "two images have the id 2"),
        (lambda c: c.pop("images"), "`images`"),
    ],
)
def test_mistakes_in_what_coco_gives_back(labels, change, part):
    file = export(labels, "coco")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert part in message_of(lambda: answer(file))


def rename(file: Path, format_: str, changed) -> None:
    """Rename the first image, `a`, in a tool's file, and remove its proposals."""
    if format_ == "csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([["image_id", "class", "value"], [changed, "dog", "0"]])
        return
    content = json.loads(file.read_text())
    if format_ == "coco":
        content["images"] = content["images"][:1]
        content["images"][0]["file_name"] = changed
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3]
        content["annotations"] = content["annotations"][:1]
    elif format_ == "fiftyone":
        kept = [{"label": "3", "attributes": {"unknown": True}}]
        content["labels"] = {changed: kept}
    else:
        unknown = annotation([])
        unknown["result"][0] |= {"from_name": "unknown", "value": {"choices": ["3"]}}
        content = [task(changed, unknown)]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    "name",
    [
        *("./a/same name.jpg", "images/a/same name.jpg", "a\\same name.jpg"),
        *(".\\a\\same name.jpg", "/mnt/other/photos/a/same name.jpg", "a//same name"),
    ],
)
def test_names_that_tools_change(labels, format_, name, capsys):
    file = export(labels, format_)
    rename(file, format_, name)
    assert answer(file) == {("a", "dog"): 0}
    told = "images found after removing these prefixes of their names: " in capsys.readouterr().err
    assert told == name.startswith(("images", "/mnt"))


def test_two_names_of_one_image_are_not_guessed(labels):
    file = export(labels, "fiftyone")
    names = ["x/a/same name.jpg", "y/a/same name.jpg"]
    file.write_text(json.dumps({"classes": CLASSES, "labels": {name: ["dog"] for name in names}}))
    message = message_of(lambda: answer(file))
    assert "both match the same image in" in message
    for name in names:
        assert repr(name) in message


def _foreign(folder: Path) -> Path:
    (folder / "foreign").mkdir()
    (folder / "labels.parquet").rename(folder / "foreign/proposal.parquet")
    return folder / "foreign"
