import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import COCO_IDS, coco_instances, write, write_coco
from messages import message_of

from cdul_steps.data.readers import ImageRecord, read_dataset
from cdul_steps.data.readers.coco import read_coco

CLASSES = ("person", "hot dog", "toothbrush")
SPLITS = {"train": "train2014", "test": "val2014"}
TRUTH = {
    "train2014": {"9": ["toothbrush", "person", "person"], "581929": [], "25": ["hot dog"]},
    "val2014": {"42": ["person"]},
}


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path / "coco", TRUTH, CLASSES)
    return tmp_path / "coco"


def edit(root, change, own="train2014"):
    """Change the dictionary in an instances file."""
    path = root / "annotations" / f"instances_{own}.json"
    instances = json.loads(path.read_text())
    change(instances)
    return write(path, json.dumps(instances))


def positives(root, classes=CLASSES):
    return {r.image_id: r.positive for r in read_coco(root, SPLITS, classes)}


def test_records_are_in_the_order_of_the_file(coco):
    folder = coco / "train2014"
    assert read_dataset("coco", coco, SPLITS, CLASSES) == [
        ImageRecord("9", "train", str(folder / "COCO_train2014_000000000009.jpg"), (0, 2)),
        ImageRecord("581929", "train", str(folder / "COCO_train2014_000000581929.jpg"), ()),
        ImageRecord("25", "train", str(folder / "COCO_train2014_000000000025.jpg"), (1,)),
        ImageRecord("42", "test", f"{coco}/val2014/COCO_val2014_000000000042.jpg", (0,)),
    ]


def test_indices_are_those_of_the_class_table_not_of_the_ids(coco):
    # The ids in the file have gaps, and its categories are in any order.
    ids = {"toothbrush": 90, "person": 1, "sofa": 13, "hot dog": 58}
    images = {**TRUTH["train2014"], "25": ["hot dog", "sofa"]}
    path = coco / "annotations" / "instances_train2014.json"
    write(path, json.dumps(coco_instances(images, ids, "train2014")))
    assert positives(coco) == {"9": (0, 2), "581929": (), "25": (1,), "42": (0,)}
    reordered = ("hot dog", "toothbrush", "person")
    assert positives(coco, reordered) == {"9": (1, 2), "581929": (), "25": (0,), "42": (2,)}


def test_a_crowd_counts_as_its_class(coco):
    def crowd(instances):
        (annotation,) = [a for a in instances["annotations"] if a["image_id"] == 25]
        annotation |= {"iscrowd": 1, "segmentation": {"counts": [0, 5, 427], "size": [18, 24]}}

    edit(coco, crowd)
    assert positives(coco)["25"] == (1,)


def test_images_without_labels_are_left_out_on_request_only(coco):
    assert positives(coco)["581929"] == ()
    kept = read_dataset("coco", coco, SPLITS, CLASSES, labelled_only=True)
    assert [r.image_id for r in kept] == ["9", "25", "42"]
    message = message_of(
        lambda: read_dataset("coco", coco, SPLITS, ("hot dog",), labelled_only=True)
    )
    assert "'test' ('val2014') has no labelled images" in message


def test_a_file_without_annotations_leaves_the_truth_unknown(coco):
    edit(coco, lambda instances: instances.pop("annotations"), "val2014")
    assert positives(coco) == {"9": (0, 2), "581929": (), "25": (1,), "42": None}


def test_an_unknown_class_names_the_nearest_category(coco):
    message = message_of(read_coco, coco, SPLITS, ("person", "hotdog"))
    assert "instances_train2014.json: no category is called 'hotdog'" in message
    assert message.endswith("did you mean 'hot dog'?")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda i: i["annotations"][0].update(category_id=12), ["for category 12", "not list"]),
        (lambda i: i["annotations"][0].update(image_id=7), ["for image 7", "not list"]),
        (lambda i: i["categories"][0].update(id=2), ["same id"]),
        (lambda i: i["categories"][0].update(name="hot dog"), ["same name"]),
        (lambda i: i.pop("images"), ["missing required field `images`"]),
        (lambda i: i["images"][1].pop("file_name"), ["`file_name`", "$.images[1]"]),
        (lambda i: i["images"][1].update(id=None), ["Expected `int | float | str`"]),
        (lambda i: i["images"][1].update(file_name="../a.jpg"), ["'../a.jpg' is outside"]),
        (lambda i: i["images"][1].update(file_name="/a.jpg"), ["'/a.jpg' is outside"]),
    ],
)
def test_mistakes_in_the_file(coco, change, parts):
    path = edit(coco, change)
    message = message_of(read_coco, coco, SPLITS, CLASSES)
    for part in [str(path), *parts]:
        assert part in message


def test_an_image_twice(coco):
    edit(coco, lambda i: i["images"].append({"id": 9, "file_name": "again.jpg"}))
    message = message_of(read_dataset, "coco", coco, SPLITS, CLASSES)
    for part in ("'9'", "COCO_train2014_000000000009.jpg", "again.jpg"):
        assert part in message


@pytest.mark.parametrize("content", [b"", b'{"images": [{"id": 1, "fi', b"\xff\xfe", b"[]"])
def test_a_torn_file(coco, content):
    path = coco / "annotations" / "instances_val2014.json"
    path.write_bytes(content)
    message = message_of(read_coco, coco, SPLITS, CLASSES)
    assert f"{path}: not a COCO instances file: " in message


def test_missing_files(coco, tmp_path):
    message = message_of(read_coco, coco, {"train": "train2017"}, CLASSES)
    assert "instances_train2017.json: no such file" in message
    assert message.endswith("train2014, val2014")
    assert "'root' must be" in message_of(read_coco, tmp_path, SPLITS, CLASSES)
    (coco / "val2014").rmdir()
    message = message_of(read_coco, coco, SPLITS, CLASSES)
    assert f"{coco / 'val2014'}: no such folder" in message


NAMES = [f"class {i}" for i in range(len(COCO_IDS))]
IMAGES = st.dictionaries(
    st.integers(0, 10**6).map(str), st.lists(st.sampled_from(NAMES), max_size=5), min_size=1
)


@given(images=IMAGES, classes=st.permutations(NAMES))
def test_what_is_read_is_what_was_written(tmp_path_factory, images, classes):
    root = tmp_path_factory.mktemp("coco")
    paths = write_coco(root, {"train2014": images}, NAMES)
    records = read_dataset("coco", root, {"train": "train2014"}, classes)
    assert [r.path for r in records] == [p.as_posix() for p in paths]
    assert [r.image_id for r in records] == list(images)
    for record, shown in zip(records, images.values(), strict=True):
        assert {classes[c] for c in record.positive} == set(shown)
        assert list(record.positive) == sorted(record.positive)
