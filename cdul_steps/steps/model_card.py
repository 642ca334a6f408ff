"""Stage model_card: what to know before using a trained classifier."""

import re
from pathlib import Path
from typing import Any

from cdul_steps.data.files import read_json, write_text
from cdul_steps.data.labels import LabelFacts
from cdul_steps.data.tables import read_table
from cdul_steps.report.words import CHECKED, checked_in_words, labels_in_words

PAPER = "[CDUL](https://arxiv.org/abs/2307.16634)"
USE = """\
## How to use it

```sh
cdul predict --model FOLDER photos --output labels.csv
cdul export --model FOLDER --output exported   # ONNX: needs neither this project nor PyTorch
```
"""


def escape(text: object) -> str:
    """Text escaped for Markdown, because class names come from users."""
    text = re.sub(r"([\\`*_\[\]<>|~#&!:$]|(?<=www)\.)", r"\\\1", " ".join(str(text).split()))
    # Characters that would start a list or underline a heading.
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def make_model_card(
    *, model: Path, data: str, images: Path, quality: Path, metrics: Path, output: Path
) -> None:
    """Write `README.md` of a model folder: its training, classes, measures, limits and use.

    `data` names the data set, `images` is its manifest, `quality` has the measures of the training
    labels, and `metrics` those of the model. Raises UserError for a missing file.
    """
    card = read_json(model / "model.json")
    measured = read_json(metrics)
    labels = LabelFacts.of(card["provenance"]["labels"], model / "model.json")
    sections = [
        _head(card, data),
        _measures(measured, read_json(quality), labels),
        *_checked(card),
        _training(card["provenance"], labels, data, images),
        _limits(card, labels, measured),
        USE,
    ]
    write_text(output, "\n".join(sections))


def _head(card: dict[str, Any], data: str) -> str:
    classes = f"{len(card['classes'])} classes"
    if card.get("activation") == "softmax":
        classes += "; the scores of an image sum to 1"
    return f"""\
# Multi-label classifier: {escape(data)}

Scores an image for each of {classes}.
A {escape(card["model"])} for images of {card["image_size"]} x {card["image_size"]} pixels.
It was trained on unlabelled images with {PAPER}, with an image-text model as the only teacher.
"""


def _measures(metrics: dict[str, Any], quality: dict[str, Any], labels: LabelFacts) -> str:
    rows = [
        f"| {escape(name)} | {_number(c['AP'])} | {c['positives']} |"
        for name, c in metrics["per_class"].items()
    ]
    table = "\n".join(["| class | AP | positives |", "|---|---|---|", *rows])
    if metrics["mAP"] is None:
        head = "No image with known truth was available: **its quality was not measured.**"
        table = "\n".join(f"- {escape(name)}" for name in metrics["per_class"])
    else:
        split, definition = Path(metrics["scores"]).stem, metrics["definition"]
        measured = quality["splits"].get(split, {})
        # Labels that are neither calibrated nor hard are listed under their construction.
        own = measured.get("pseudo_labels", measured.get(labels.construction, {}))
        head = (
            f"mAP {_number(metrics['mAP'])} on {metrics['images']} images of the split {split}; "
            f"CF1 {_number(metrics['at_threshold']['CF1'])} and "
            f"OF1 {_number(metrics['at_threshold']['OF1'])} at {definition['threshold']}. "
            f"Labels made from its teacher's scores, in the same way as its training labels, reach "
            f"mAP {_number(own.get('mAP'))} there.\n\n"
            f"All in percent; {definition['meaning'][definition['ap']]}; "
            f"{definition['meaning'][definition['difficult']]}."
        )
    return f"## Classes and measures\n\n{head}\n\n{table}\n"


def _checked(card: dict[str, Any]) -> list[str]:
    """The results of a check by a person, and the thresholds; empty without a check."""
    checked, thresholds = card.get("checked"), card.get("thresholds") or {}
    if not checked:
        return []
    words = checked_in_words(checked)
    rows = [f"| {escape(name)} | {value:.3f} |" for name, value in thresholds.items()]
    table = "\n".join(["| class | threshold |", "|---|---|", *rows])
    return [
        f"{CHECKED}\n\n{words[:1].upper()}{words[1:]}, over all classes at the "
        "thresholds below, which follow from these answers. In 90 of 100 such checks the true "
        f"value lies between the two numbers.\n\n{table}\n"
    ]


def _training(provenance: dict[str, Any], labels: LabelFacts, data: str, images: Path) -> str:
    settings, teacher = provenance["training"], labels.similarity
    alignment = settings["alignment"]
    splits = read_table(images, ["split"])["split"].to_pylist()
    split = labels.split or "train"
    facts = {
        "images": f"{splits.count(split)} of {data}, split {split}",
        "teacher": " ".join(filter(None, (teacher.get("model"), teacher.get("pretrained")))),
        "prompts": "; ".join(teacher.get("templates", [])),
        "pseudo-labels": _listed(labels_in_words(labels)),
        "start": settings["weights"] or "random weights",
        "training": f"{settings['epochs']} epochs of batches of {settings['batch_size']}, "
        f"{settings['optimizer']}, learning rate {settings['learning_rate']:g}, "
        f"loss {settings['loss']}, seed {settings['seed']}",
        "gradient alignment": f"from epoch {alignment['warmup'] + 1} on"
        if alignment["enabled"]
        else "none",
        "software": _listed(provenance["software"]),
    }
    rows = "\n".join(f"| {name} | {escape(value)} |" for name, value in facts.items())
    return f"## How it was made\n\n| | |\n|---|---|\n{rows}\n\n`model.json` has all settings.\n"


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _threshold(card: dict[str, Any]) -> str:
    if card.get("checked"):
        return "Its thresholds were chosen from a person's answers on a sample of images."
    return (
        f"The threshold of {card['threshold']:g} is an unchecked default: `cdul check` chooses "
        "thresholds on your own images."
    )


def _limits(card: dict[str, Any], labels: LabelFacts, metrics: dict[str, Any]) -> str:
    absent = metrics["classes_without_positives"] if metrics["mAP"] is not None else []
    checked = f"People corrected {labels.corrections} training labels; the rest are unchecked."
    lines = [
        (checked if labels.corrections else "Nobody checked its training labels.")
        + " The model has also learnt whatever its teacher confuses, overlooks or is biased about.",
        "It knows only the classes above; it ignores anything else in an image.",
        "Its outputs are scores between 0 and 1, not calibrated probabilities. " + _threshold(card),
        "The measures hold for images like those of its data set. Measure it again on others, and "
        "do not let it make decisions about people.",
    ]
    if absent:
        names = ", ".join(escape(name) for name in absent)
        lines.append(f"Not measured, because no image shows them: {names}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
