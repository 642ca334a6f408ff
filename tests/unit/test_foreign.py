"""All readers apply the same rules to files written by other software."""

import codecs
import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from forms import CLASSES, FORMS, SHOWN, every_form, read_form, write_annotations, write_form
from layouts import draw, write
from messages import message_of

from cdul_steps.data.classes import load_classes
from cdul_steps.data.corrections import UNKNOWN, apply_corrections, read_corrections
from cdul_steps.data.foreign import as_id, as_number, same, same_image, unseen
from cdul_steps.data.readers import READERS, read_dataset
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.data.truth import measure_table
from cdul_steps.tools.review import export_review, import_review
from cdul_steps.tools.show import show_table

SPELT = {
    "as it is": CLASSES,
    "NFD": tuple(unicodedata.normalize("NFD", name) for name in CLASSES),
    "upper case": tuple(name.upper() for name in CLASSES),
    "full width": ("caf\u00e9", "\uff44\uff4f\uff47", "owl"),
    "unseen": ("caf\u00e9\u200b", "dog\ufeff", "o\u00adwl"),
}


def test_every_reader_with_labels_is_walked():
    # The archive readers have their own test files.
    others = {"folder", "webdataset", "parquet"}
    assert {reader for reader, _, _ in FORMS.values()} | others == set(READERS)


# Names of classes


@every_form
@pytest.mark.parametrize("spelt", SPELT)
def test_a_label_is_the_class_that_has_its_name_in_any_form(form, spelt, tmp_path):
    told: list[str] = []
    root = write_form(tmp_path / "set", form, SPELT[spelt])
    found = read_form(root, form, tell=told.append)
    assert found == {image: tuple(places) for image, places in SHOWN.items()}
    heard = [line for line in told if ": read " in line]
    assert len(heard) == (spelt not in ("as it is", "NFD"))
    assert all("'dog'" in line for line in heard)


@pytest.mark.parametrize("form", [form for form in FORMS if "annotations" not in form])
def test_two_labels_of_one_class_are_not_guessed(form, tmp_path):
    """If every label is stored with its image, they are spellings."""
    labels = ("caf\u00e9", "dog", "owl", "DOG")
    root = write_form(tmp_path / "set", form, labels, {**SHOWN, "4": [3]})
    if form == "nuswide, listed":
        assert read_form(root, form)["4"] == (1,)
        return
    message = message_of(lambda: read_form(root, form))
    assert "'dog'" in message and "'DOG'" in message


@every_form
def test_what_is_no_class_is_told(form, tmp_path):
    told: list[str] = []
    root = write_form(tmp_path / "set", form, (*CLASSES, "sofa"), {**SHOWN, "4": [3]})
    assert read_form(root, form, tell=told.append)["4"] == ()
    assert any("no class" in line and "sofa" in line for line in told)


@pytest.mark.parametrize("spelt", SPELT)
def test_corrections_scores_and_show_find_the_class_too(spelt, tmp_path):
    names = SPELT[spelt]
    path = tmp_path / "c.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image_id", "class", "value"], ["a", names[0], "1"]])
    labels = np.zeros((1, 3), np.float32)
    column = apply_corrections(labels, ["a"], CLASSES, read_corrections(path), path)
    assert labels.tolist() == [[1, 0, 0]] and column.to_pylist() == [["caf\u00e9"]]

    ids = pa.array(["a", "b"])
    images = pa.table({"image_id": ids, "positive": pa.array([[0], [1]], pa.list_(pa.int32()))})
    write_table(describe(images, "images", classes=list(CLASSES)), tmp_path / "images.parquet")
    scores = score_table(ids, ids, names, np.array([[1, 0, 0], [0, 1, 0]]))
    write_table(scores, tmp_path / "scores.parquet")
    tables = {"scores": tmp_path / "scores.parquet", "images": tmp_path / "images.parquet"}
    assert measure_table(**tables, difficult="ignore", ap="all")["mAP"] == 100

    write_table(describe(scores, "scores"), tmp_path / "scores.parquet")
    show = {"top": 1, "as_json": True, "of_class": "dog"}
    assert json.loads(show_table(tmp_path / "scores.parquet", **show))["classes"].keys() == {
        names[1]
    }


def test_a_correction_that_says_two_things(tmp_path):
    labels, path = np.zeros((1, 2), np.float32), Path("c.csv")
    twice = {("a", "dog"): 1.0, ("./a", "DOG"): 0.0}
    message = message_of(apply_corrections, labels, ["a"], ["dog", "cat"], twice, path)
    assert "'dog' of 'a' to two values" in message
    agreed = {("a", "dog"): 1.0, ("./a", "DOG"): 1.0}
    column = apply_corrections(labels, ["a"], ["dog", "cat"], agreed, path)
    assert column.to_pylist() == [["dog"]]


def test_classes_that_differ_in_form_only_are_one(tmp_path):
    for other in ("CAF\u00c9", "cafe\u0301", "\uff43af\u00e9", "caf\u00e9 "):
        path = write(tmp_path / "c.txt", f"caf\u00e9\n{other}\n")
        assert "is listed twice" in message_of(load_classes, path)


@pytest.mark.parametrize(
    "text",
    [
        "['clouds' 'sky']",
        "['clouds'\\n 'sky']",
        "['a', 'b' 'c']",
        '["clouds" "sky"]',
        "['a',, 'b']",
    ],
)
def test_a_list_of_labels_without_commas_is_refused(text, tmp_path):
    path = write(tmp_path / "nus_wid_data.csv")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["filepath", "label", "split_name"], ["a.jpg", text, "a"]])
    message = message_of(lambda: read_dataset("nuswide", path, {"train": "a"}, ["clouds", "sky"]))
    assert "line 2" in message or "line 3" in message
    assert "commas" in message


@pytest.mark.parametrize("text", ["[]", "['sky',]", "[u'sky']", '[ "sky" ]', "['s\\x6by']"])
def test_a_list_of_labels_is_read(text, tmp_path):
    path = tmp_path / "nus_wid_data.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["filepath", "label", "split_name"], ["a.jpg", text, "a"]])
    (record,) = read_dataset("nuswide", path, {"train": "a"}, ["sky"])
    assert record.positive == (() if text == "[]" else (0,))


# Files


@every_form
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_text(form, encoding, tmp_path):
    root = write_form(tmp_path / "set", form)
    files = [p for p in (tmp_path / "set").rglob("*") if p.suffix in (".txt", ".csv", ".json")]
    if form == "voc, annotations":
        files += (tmp_path / "set").rglob("*.xml")
    for path in files:
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
        marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        assert path.read_bytes().startswith(marks)
    assert bool(files) == (form != "table, parquet")
    assert read_form(root, form) == {image: tuple(places) for image, places in SHOWN.items()}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_class_tables_and_corrections_may_have_one_too(encoding, tmp_path):
    for name, text in (("c.txt", "caf\u00e9\ndog\n"), ("c.yaml", "- caf\u00e9\n- dog\n")):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert load_classes(tmp_path / name).names == ("caf\u00e9", "dog")
    (tmp_path / "c.csv").write_text("image_id,class,value\na,dog,1\n", encoding=encoding)
    assert read_corrections(tmp_path / "c.csv") == {("a", "dog"): 1.0}


@pytest.mark.parametrize("form", [form for form in FORMS if "voc" not in form])
def test_backslashes_lead_to_the_image(form, tmp_path):
    root = write_form(tmp_path / "set", form, images={"1": [0, 1, 2]})
    if form == "coco":
        (tmp_path / "set/a/sub").mkdir()
        path = root / "annotations/instances_a.json"
        content = json.loads(path.read_text())
        content["images"][0]["file_name"] = "sub\\1.jpg"
        write(path, json.dumps(content))
    else:
        root = write_form(tmp_path / "set", form, images={"sub\\1.jpg": [0, 1, 2]})
    reader, own, _ = FORMS[form]
    (record,) = read_dataset(reader, root, {"train": own}, CLASSES)
    assert record.path.endswith("/sub/1.jpg")
    assert record.image_id == ("1" if form == "coco" else "sub/1.jpg")


def test_a_backslash_that_is_in_the_files_name_stays(tmp_path):
    write(tmp_path / "a\\b.jpg")
    path = write(tmp_path / "t.csv", "path\na\\b.jpg\n")
    (record,) = read_dataset("table", path, {"train": "a"}, CLASSES)
    assert Path(record.path).is_file()


@every_form
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_an_image_is_found_in_the_form_that_the_disk_has(form, on_disk, tmp_path):
    listed = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[on_disk], "\u00e9t\u00e9")
    there = unicodedata.normalize(on_disk, "\u00e9t\u00e9")
    name = "1" if form == "coco" else listed + ".jpg" * ("voc" not in form)
    root = write_form(tmp_path / "set", form, images={name: [0, 1, 2]})
    if form == "coco":
        path = root / "annotations/instances_a.json"
        content = json.loads(path.read_text())
        content["images"][0]["file_name"] = f"{listed}.jpg"
        write(path, json.dumps(content))
    below = {"voc": "JPEGImages", "coco": "a", "nuswide": "Flickr", "table": "."}
    place = "." if root.suffix == ".csv" else below[FORMS[form][0]]
    draw(tmp_path / "set" / place / f"{there}.jpg")
    reader, own, _ = FORMS[form]
    (record,) = read_dataset(reader, root, {"train": own}, CLASSES)
    assert Path(record.path).is_file()


# Numbers and ids


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *((value, 1) for value in (1, 1.0, True, "1", "1.0", " 1.00 ", "true", "True", np.True_)),
        *((value, 0) for value in (0, 0.0, False, "0", "0.0", "false", "FALSE", np.int8(0))),
        *((value, None) for value in (None, "", "  ", "nan", "NaN", float("nan"))),
        *((value, -1) for value in (-1, "-1", "-1.0")),
    ],
)
def test_numbers(value, number):
    assert as_number(value) == number
    assert type(as_number(value)) in (float, type(None))


@pytest.mark.parametrize("value", ["yes", "one", "[]", [], {}, "1,0"])
def test_no_numbers(value):
    with pytest.raises(ValueError, match="float"):
        as_number(value)


ONES, NOUGHTS = ("1", "1.0", "true"), ("0", "0.0", "false")


@pytest.mark.parametrize("form", ["table, csv", "nuswide, official", "voc, lists"])
@pytest.mark.parametrize("way", range(len(ONES)))
def test_labels_are_written_in_several_ways(form, way, tmp_path):
    one, nought = ONES[way], NOUGHTS[way]
    root = write_form(tmp_path / "set", form)
    for path in (tmp_path / "set").rglob("*.*"):
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str)
            frame[list(CLASSES)] = frame[list(CLASSES)].replace({"1": one, "0": nought})
            frame.to_csv(path, index=False)
        elif path.name.startswith("Labels_"):
            lines = [one if line == "1" else nought for line in path.read_text().split()]
            write(path, "\n".join(lines))
        elif path.name.endswith("_a.txt"):
            rows = [line.split() for line in path.read_text().splitlines()]
            lines = [f"{i} {one if value == '1' else f'-{ONES[way]}'}\n" for i, value in rows]
            write(path, "".join(lines))
    if form == "voc, lists" and one == "true":
        # Neither -1 nor 0 ("difficult" there) is false.
        assert "expected 1, 0 or -1" in message_of(lambda: read_form(root, form))
    else:
        assert read_form(root, form) == {image: tuple(places) for image, places in SHOWN.items()}


@pytest.mark.parametrize("flag", [*ONES, *NOUGHTS, ""])
def test_difficult_and_unknown_are_written_in_several_ways(flag, tmp_path):
    root = write_annotations(tmp_path, {"1": ["dog"]}, ())
    path = root / "Annotations/1.xml"
    text = path.read_text().replace("</name>", f"</name><difficult>{flag}</difficult>")
    write(path, text)
    (record,) = read_dataset("voc", root, {"train": "a"}, ["dog"])
    assert bool(record.difficult) == (flag in ONES) != bool(record.positive)
    if flag:
        write(tmp_path / "c.csv", f"image_id,class,value\na,dog,{flag}\n")
        assert read_corrections(tmp_path / "c.csv") == {("a", "dog"): float(flag in ONES)}


@pytest.mark.parametrize("kind", [str, float, lambda value: f" {value} "])
def test_ids_of_coco_are_compared_as_text(kind, tmp_path):
    root = write_form(tmp_path / "set", "coco")
    path = root / "annotations/instances_a.json"
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content["annotations"]):
        key = ("image_id", "category_id")[number % 2]
        annotation[key] = kind(annotation[key])
    for category in content["categories"][:1]:
        category["id"] = kind(category["id"])
    content["images"][0]["id"] = kind(1)
    write(path, json.dumps(content))
    assert read_form(root, "coco") == {image: tuple(places) for image, places in SHOWN.items()}


@pytest.mark.parametrize(
    ("value", "text"), [(9, "9"), (9.0, "9"), (" 9", "9"), ("009", "009"), (None, ""), ("a", "a")]
)
def test_ids(value, text):
    assert as_id(value) == text


def test_ids_of_a_table_that_went_through_pandas(tmp_path):
    frame = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "image_id": [7.0, 8.0], "dog": [1.0, np.nan]})
    frame.to_parquet(tmp_path / "t.parquet")
    records = read_dataset("table", tmp_path / "t.parquet", {"train": "a"}, ["dog"])
    assert [(r.image_id, r.positive) for r in records] == [("7", (0,)), ("8", None)]


# COCO's categories, VOC's images


@pytest.mark.parametrize("label", ["dog", "DOG"])
def test_a_category_of_the_same_name_without_annotations_does_no_harm(label, tmp_path):
    root = write_form(tmp_path / "set", "coco")
    path = root / "annotations/instances_a.json"
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": label, "supercategory": "none"})
    write(path, json.dumps(content))
    assert read_form(root, "coco") == {image: tuple(places) for image, places in SHOWN.items()}
    content["annotations"].append({"id": 99, "image_id": 1, "category_id": 0})
    write(path, json.dumps(content))
    message = message_of(lambda: read_form(root, "coco"))
    assert f"the same name, '{label}' (id 0) and 'dog' (id 2)" in message


def test_categories_that_are_no_class_may_share_a_name(tmp_path):
    root = write_form(tmp_path / "set", "coco")
    path = root / "annotations/instances_a.json"
    content = json.loads(path.read_text())
    content["categories"] += [{"id": 77, "name": "sofa"}, {"id": 78, "name": "sofa"}]
    content["annotations"] += [
        {"image_id": 3, "category_id": 77},
        {"image_id": 3, "category_id": 78},
    ]
    write(path, json.dumps(content))
    told: list[str] = []
    assert read_form(root, "coco", tell=told.append)["3"] == ()
    assert any("sofa (2)" in line for line in told)


def test_voc_finds_images_of_other_suffixes(tmp_path):
    root = FORMS["voc, lists"][2](tmp_path, {"1": [], "2": [], "3": [], "4": []}, CLASSES)
    for name in ("1.png", "2.JPG", "3.txt", "4.png", "4.jpg"):
        write(root / "JPEGImages" / name)
    records = read_dataset("voc", root, {"train": "a"}, CLASSES)
    names = [Path(record.path).name for record in records]
    assert names == ["1.png", "2.JPG", "3.jpg", "4.jpg"]


# JSON


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_in_what_is_not_read(word, tmp_path):
    root = write_form(tmp_path / "set", "coco")
    path = root / "annotations/instances_a.json"
    write(path, path.read_text().replace("80.4", word))
    assert word in path.read_text()
    assert read_form(root, "coco") == {image: tuple(places) for image, places in SHOWN.items()}


@pytest.mark.parametrize("format_", ["label-studio", "coco", "fiftyone"])
@pytest.mark.parametrize("fault", ["utf-8-sig", "utf-16", "NaN"])
def test_what_a_tool_gives_back_is_read_by_the_same_rule(format_, fault, tmp_path):
    ids = pa.array(["a"])
    table = score_table(ids, pa.array(["/x/a.jpg"]), CLASSES, np.array([[0.9, 0.1, 0.9]]))
    write_table(describe(table, "scores", classes=list(CLASSES)), tmp_path / "labels.parquet")
    sizes = pa.table({"image_id": ids, "width": [4], "height": [3]})
    write_table(sizes, tmp_path / "images.parquet")
    output = tmp_path / "review"
    export_review(
        labels=tmp_path / "labels.parquet",
        format_=format_,
        output=output,
        threshold=0.5,
        limit=None,
        images=tmp_path / "images.parquet",
        root=None,
    )
    answers = {
        "label-studio": [
            {
                "data": {"image_id": "a"},
                "annotations": [
                    {
                        "lead_time": 0.5,
                        "result": [
                            {
                                "from_name": "present",
                                "type": "choices",
                                "value": {"choices": ["CAFE\u0301", "dog"]},
                            }
                        ],
                    }
                ],
            }
        ],
        "coco": {
            "images": [{"id": "1", "file_name": "x\\a.jpg"}],
            "categories": [
                {"id": 0, "name": "dog"},
                *({"id": i, "name": n} for i, n in ((1, "CAFE\u0301"), (2, "dog"))),
            ],
            "annotations": [
                {"image_id": 1, "category_id": 1.0, "area": 0.5},
                {"image_id": 1.0, "category_id": "2", "attributes": {"unknown": "1.0"}},
            ],
        },
        "fiftyone": {
            "classes": ["CAFE\u0301", "dog"],
            "labels": {".\\x\\a.jpg": [{"label": 0, "confidence": 0.5}, {"label": "Dog"}]},
        },
    }
    text = json.dumps(answers[format_], ensure_ascii=False)
    if fault == "NaN":
        (tmp_path / "answer.json").write_text(text.replace("0.5", "NaN"), encoding="utf-8")
    else:
        (tmp_path / "answer.json").write_text(text, encoding=fault)
    corrections = tmp_path / "c.csv"
    import_review(review=output, file=tmp_path / "answer.json", confirm=False, output=corrections)
    dog = UNKNOWN if format_ == "coco" else 1
    assert read_corrections(corrections) == {("a", "dog"): dog, ("a", "owl"): 0}


# Names


@pytest.mark.parametrize(
    "name", ["a\tb", "a\x00", "\x1b[1m", "a\u200bb", "\ufeffa", "a\u00a0b", "a\u2003b", "a\u3164"]
)
def test_characters_that_cannot_be_seen(name):
    assert "U+" in unseen(name)


@pytest.mark.parametrize(
    "name", ["a b", "caf\u00e9", "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f467"]
)
def test_characters_that_can(name):
    assert unseen(name) is None


def test_names_compare_in_one_form():
    assert same(" Hot\u00a0 DOG\u200b ") == same("hot dog") != same("hotdog")
    assert same_image(".\\a\\e\u0301.jpg") == same_image("a//\u00e9.jpg") == "a/\u00e9.jpg"
