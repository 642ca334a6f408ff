from pathlib import Path

import pytest
from messages import message_of
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from cdul_steps.data.classes import (
    ClassTable,
    check_choice,
    load_classes,
    load_names,
    same_prompts,
)
from cdul_steps.errors import UserError
from cdul_steps.method.context import REFERENCE, plain_name

CLASSES = Path(__file__).parents[2] / "config" / "classes"
WORDS = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
"""Class names that are written without spaces."""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_voc_has_the_official_order():
    table = load_classes(CLASSES / "voc.yaml")
    assert " ".join(table.names) == (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
        "person pottedplant sheep sofa train tvmonitor"
    )
    assert table.aliases[0] == ("aeroplane", "airplane")
    assert table.aliases[10] == ("dining table",)


def test_coco_has_the_order_of_its_ids():
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    expected = [name for name in categories if name not in ("__background__", "N/A")]
    assert list(load_classes(CLASSES / "coco.yaml").names) == expected


def test_nuswide_has_the_order_of_its_list():
    assert " ".join(load_classes(CLASSES / "nuswide.yaml").names) == (
        "airport animal beach bear birds boats book bridge buildings cars castle cat cityscape "
        "clouds computer coral cow dancing dog earthquake elk fire fish flags flowers food fox "
        "frost garden glacier grass harbor horses house lake leaf map military moon mountain "
        "nighttime ocean person plane plants police protest railroad rainbow reflection road "
        "rocks running sand sign sky snow soccer sports statue street sun sunset surf swimmers "
        "tattoo temple tiger tower town toy train tree valley vehicle water waterfall wedding "
        "whales window zebra"
    )


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide"])
def test_the_first_alias_is_the_plain_name(name):
    table = load_classes(CLASSES / f"{name}.yaml")
    for plain, aliases in zip(table.names, table.aliases, strict=True):
        assert aliases[0] == WORDS.get(plain, plain)
    everything = [alias for aliases in table.aliases for alias in aliases]
    assert len(set(everything)) == len(everything)


def test_yaml_names_and_aliases(tmp_path):
    text = "- cat\n- {name: tvmonitor, aliases: [tv monitor, television]}\n- name: ' dog '\n"
    assert load_classes(write(tmp_path, "c.yml", text)) == ClassTable(
        ("cat", "tvmonitor", "dog"), (("cat",), ("tv monitor", "television"), ("dog",))
    )


def test_text_ignores_blank_lines_comments_and_byte_order_mark(tmp_path):
    path = write(
        tmp_path, "c.txt", "\ufeff# animals\n\n cat \r\ndining table\n  # not a class\nc#\n"
    )
    assert load_classes(path).names == ("cat", "dining table", "c#")


def test_names_are_normalised_to_nfc(tmp_path):
    assert load_classes(write(tmp_path, "c.txt", "cafe\u0301\n")).names == ("caf\u00e9",)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("c.txt", "", ["no classes"]),
        ("c.txt", "# nothing\n", ["no classes"]),
        ("c.yaml", "", ["no classes"]),
        ("c.yaml", "[]", ["no classes"]),
        ("c.txt", "cat\ndog\n CAT\n", ["entry 3", "'CAT'", "twice"]),
        ("c.txt", "caf\u00e9\ncafe\u0301\n", ["entry 2", "twice"]),
        ("c.yaml", "[cat, '  ']", ["entry 2", "empty"]),
        ("c.yaml", "[yes, no]", ["entry 1", "True", "quotes"]),
        ("c.yaml", "[cat, 1]", ["entry 2", "1", "quotes"]),
        ("c.yaml", "[cat, null]", ["entry 2", "quotes"]),
        ("c.yaml", "- {name: off}", ["entry 1", "False", "quotes"]),
        ("c.yaml", "- {name: cat, alias: [kitty]}", ["unknown key 'alias'", "aliases"]),
        ("c.yaml", "- {aliases: [kitty]}", ["'name' is missing"]),
        ("c.yaml", "- {name: cat, aliases: kitty}", ["'cat'", "must be a list"]),
        ("c.yaml", "- {name: cat, aliases: []}", ["'cat'", "must be a list"]),
        ("c.yaml", "- {name: cat, aliases: [on]}", ["'cat'", "quotes"]),
        ("c.yaml", "- {name: cat, aliases: ['']}", ["'cat'", "empty"]),
        ("c.yaml", "cat: 1", ["expected a list", "a mapping"]),
        ("c.yaml", "- cat\n- [dog\n", ["not valid YAML", "line"]),
        ("c.yaml", "- a\n- \x00", ["not valid YAML"]),
        ("c.txt", "cat\nimage_id\n", ["entry 2", "'image_id'", "column"]),
        ("c.txt", "Path\n", ["'Path'", "column"]),
        ("c.txt", "split\n", ["'split'", "column"]),
        ("c.txt", "Image_ID\n", ["'Image_ID'", "column"]),
        ("c.txt", "cat\ndo\tg\n", ["entry 2", "U+0009"]),
        ("c.txt", "cat\ndo\x1cg\n", ["entry 2", "U+001C"]),
        ("c.txt", "cat\ndo\u2028g\n", ["entry 2", "U+2028", "line separator"]),
        ("c.txt", "\x1b[31mcat\n", ["entry 1", "U+001B"]),
        ("c.txt", "hot\u00a0dog\n", ["entry 1", "U+00A0", "no-break space"]),
        ("c.txt", "hot\u3000dog\n", ["entry 1", "ideographic space"]),
        ("c.txt", "do\u200bg\n", ["entry 1", "zero width space"]),
        ("c.txt", "do\u00adg\n", ["entry 1", "soft hyphen"]),
        ("c.yaml", '- "cat\\ndog"\n', ["entry 1", "U+000A"]),
        ("c.yaml", '- "\\0"\n', ["entry 1", "U+0000"]),
        ("c.yaml", '- "\\ud83d"\n', ["entry 1", "U+D83D"]),
        ("c.yaml", '- {name: cat, aliases: ["c\\u200bat"]}\n', ["aliases", "zero width space"]),
        ("c.txt", "- cat\n- dog\n", ["entry 1", "'- cat'", "YAML", ".yaml"]),
        ("c.txt", "cat\n* dog\n", ["entry 2", "'* dog'"]),
        ("c.txt", "cat\n\u2022 dog\n", ["entry 2", "begins as in a list"]),
        ("c.txt", "cat,\ndog\n", ["entry 1", "'cat,'", "ends with"]),
        ("c.txt", "cat;\ndog\n", ["entry 1", "'cat;'"]),
        ("c.yaml", "- cat,\n- dog\n", ["entry 1", "'cat,'"]),
        ("c.txt", "cat, dog\n", ["one line"]),
        ("c.txt", '["cat", "dog"]\n', ["entry 1", "JSON", ".yaml"]),
        ("c.json", '[\n  "cat",\n  "dog"\n]\n', ["entry 1", "JSON"]),
        ("c.txt", '{"0": "cat"}\n', ["entry 1", "JSON"]),
        ("c.txt", '"cat"\n"dog"\n', ["entry 1", "quotes"]),
        ("c.txt", "'cat',\n'dog'\n", ["entry 1", "quotes"]),
        ("c.txt", "1. cat\n2. dog\n", ["numbered"]),
        ("c.txt", "0: cat\n1: dog\n", ["numbered"]),
        ("c.txt", "0 cat\n1 dog\n", ["numbered"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, name, text, parts):
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as caught:
        load_classes(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in [str(path), *parts]:
        assert part in message


def test_names_that_only_look_like_something_else(tmp_path):
    family = "\U0001f469\u200d\U0001f467"
    doors = write(tmp_path, "c.txt", "2 door car\n4 door car\n")
    assert load_classes(doors).names == ("2 door car", "4 door car")
    names = ("hair drier, toy", "-cat", "'tis", "f-16", "2 fast", "a: b", family)
    assert load_classes(write(tmp_path, "c.txt", "\n".join(names))).names == names


def test_classes_that_no_prompt_tells_apart():
    names = ("crane", "Kran", "bird", "crane bird", "dog")
    prompted = (["crane"], ["Crane "], ["bird", "crane"], ["crane", "BIRD"], ["dog"])
    assert same_prompts(names, prompted) == [["crane", "Kran"], ["bird", "crane bird"]]
    assert same_prompts(names, [[name] for name in names]) == []


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_classes(tmp_path / "none.yaml")
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_classes(path)


def test_context_names_are_read_as_classes_are(tmp_path):
    classes = write(tmp_path, "c.txt", "cat\n")
    context = write(tmp_path, "x.txt", "# else\ntree\npath\n")
    table, listed = load_names(classes, context, ["tree"])
    assert (table.names, listed.names) == (("cat",), ("tree", "path"))
    assert load_names(classes, None)[1] == ClassTable((), ())


def test_the_everyday_list_is_plain():
    listed = load_names(CLASSES / "voc.yaml", CLASSES.parent / "context/everyday.txt")[1]
    assert 150 <= len(listed.names) <= 400
    assert set(map(plain_name, REFERENCE)) <= set(map(plain_name, listed.names))
    assert len(set(map(plain_name, listed.names))) == len(listed.names)


@pytest.mark.parametrize(
    ("text", "keep", "parts"),
    [
        ("", [], ["context list", "no names; list at least one"]),
        ("tree\nTree\n", [], ["context list", "entry 2", "'Tree' is listed twice"]),
        ("tree\n", ["bush"], ["context_keep", "'bush' is not in"]),
        ("tree\nCat\n", ["Cat"], ["context_keep", "'Cat' is a class"]),
    ],
)
def test_mistakes_of_the_context_are_told_in_one_line(tmp_path, text, keep, parts):
    classes, context = write(tmp_path, "c.txt", "cat\n"), write(tmp_path, "x.txt", text)
    message = message_of(load_names, classes, context, keep)
    for part in parts:
        assert part in message


def test_a_context_list_that_is_missing(tmp_path):
    classes = write(tmp_path, "c.txt", "cat\n")
    message = message_of(load_names, classes, tmp_path / "none.txt")
    assert f"context list {tmp_path / 'none.txt'}: cannot be read (No such file" in message


def test_one_class_needs_context():
    check_choice(["cat"], ["tree"], "c.txt")
    assert "one class, 'cat'" in message_of(check_choice, ["cat"], [], "c.txt")
