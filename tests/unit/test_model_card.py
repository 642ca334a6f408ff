"""The model card: its content, and class names that contain Markdown."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cdul_steps.data.tables import describe, write_table
from cdul_steps.errors import UserError
from cdul_steps.steps.model_card import escape, make_model_card

NASTY = "a|b *c* <img src=x> [d](http://e)"


def shown(text: str) -> tuple[str, set[str]]:
    """The text that Markdown shows, and the other elements."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens if token.type == "inline" for child in token.children]
    kinds = {t.type for t in tokens} | {child.type for child in inline}
    return "".join(child.content for child in inline), kinds


@given(st.text())
def test_any_name_is_shown_as_it_is(name):
    plain = " ".join(f"{name} x".split())
    text, kinds = shown(f"- {escape(name)} x")
    assert kinds <= {
        *("bullet_list_open", "list_item_open", "paragraph_open", "inline"),
        *("bullet_list_close", "list_item_close", "paragraph_close", "text", "text_special"),
    }
    # CommonMark replaces the character 0.
    assert text == plain.replace("\0", "\ufffd")


@pytest.mark.parametrize("name", [NASTY, "- a", "1. a", "# a", "== ", "`a", "a\nb", "&lt;", "\\"])
def test_a_name_in_a_table_is_one_cell(name):
    text, kinds = shown(f"| class | AP |\n|---|---|\n| {escape(name)} | 1 |")
    assert text == f"classAP{' '.join(name.split())}1"
    assert not kinds & {"html_inline", "link_open", "em_open", "code_inline"}


@pytest.fixture
def made(tmp_path):
    """The files of a training, and a function that writes its card."""
    classes = ["cat", NASTY]
    card = {
        "model": "resnet10t",
        "classes": classes,
        "image_size": 64,
        "threshold": 0.5,
        "provenance": {
            "training": {
                "weights": None,
                "epochs": 3,
                "batch_size": 8,
                "optimizer": "adamw",
                "learning_rate": 1e-5,
                "loss": "kl",
                "seed": 0,
                "alignment": {"enabled": True, "warmup": 2},
            },
            "labels": {
                "split": "train",
                "construction": "final",
                "tau": 0.01,
                "threshold": None,
                "similarity": {"model": "RN50", "pretrained": "openai", "templates": ["{}"]},
            },
            "software": {"torch": "2.6"},
        },
    }
    metrics = {
        "scores": "predictions/test.parquet",
        "definition": {
            "difficult": "ignore",
            "ap": "all",
            "threshold": 0.5,
            "meaning": {"ignore": "left out", "all": "all points"},
        },
        "mAP": 61.234,
        "at_threshold": {"CF1": 50.0, "OF1": 51.0},
        "images": 7,
        "classes_without_positives": [NASTY],
        "per_class": {
            "cat": {"AP": 61.234, "positives": 3, "images": 7},
            NASTY: {"AP": None, "positives": 0, "images": 7},
        },
    }
    quality = {"splits": {"test": {"final": {"mAP": 70.0}}}}
    (tmp_path / "model").mkdir()
    images = pa.table({"image_id": list("abc"), "split": ["train", "train", "test"]})
    write_table(describe(images, "images"), tmp_path / "images.parquet")

    def make() -> str:
        for name, value in {
            "model/model.json": card,
            "metrics.json": metrics,
            "quality.json": quality,
        }.items():
            (tmp_path / name).write_text(json.dumps(value))
        make_model_card(
            model=tmp_path / "model",
            data="pets",
            images=tmp_path / "images.parquet",
            quality=tmp_path / "quality.json",
            metrics=tmp_path / "metrics.json",
            output=tmp_path / "model/README.md",
        )
        return (tmp_path / "model/README.md").read_text()

    return make, card, metrics, quality, tmp_path


def test_a_measured_model(made):
    make, *_ = made
    text = make()
    for part in (
        "mAP 61.23 on 7 images of the split test",
        "reach mAP 70.00 there",
        "| cat | 61.23 | 3 |",
        "| - | 0 |",
        "2 of pets, split train",
        "RN50 openai",
        "construction final, tau 0.01 |",
        "learning rate 1e-05",
        "from epoch 3 on",
        "Not measured, because no image shows them",
    ):
        assert part in text
    words, kinds = shown(text)
    assert words.count(NASTY) == 2 and "html_inline" not in kinds


def test_calibrated_labels_are_measured_as_they_are(made):
    make, *_, quality, _ = made
    quality["splits"]["test"]["pseudo_labels"] = {"mAP": 71.5}
    assert "reach mAP 71.50 there" in make()


def test_a_checked_model(made):
    make, card, *_ = made
    text = make()
    assert "an unchecked default" in text and "Checked by a person" not in text
    card["checked"] = {"answers": 200, "precision": [0.81, 0.85, 0.884], "recall": [0.4, 0.5, 0.6]}
    card["thresholds"] = {"cat": 0.4567, NASTY: 0.5}
    text = make()
    assert "Checked on 200 answers: precision 81 to 88, recall 40 to 60 percent" in text
    assert "| cat | 0.457 |" in text and "unchecked default" not in text
    words, kinds = shown(text)
    assert words.count(NASTY) == 3 and "html_inline" not in kinds


def test_nothing_known_is_said_so(made):
    make, _, metrics, *_ = made
    metrics |= {"mAP": None, "images": 0}
    metrics["per_class"] = {name: {"AP": None, "positives": 0} for name in metrics["per_class"]}
    text = make()
    assert "was not measured" in text and "- cat" in text and "mAP" not in text


def test_labels_from_elsewhere(made):
    make, card, *_ = made
    card["provenance"]["labels"] = {"digest": "00"}
    assert "| teacher |  |" in make()


def test_a_missing_file(made):
    make, *_, folder = made
    make()
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json: no such file"):
        make_model_card(
            model=folder / "model",
            data="pets",
            images=folder / "images.parquet",
            quality=folder / "quality.json",
            metrics=folder / "metrics.json",
            output=folder / "card.md",
        )
