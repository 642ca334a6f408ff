"""Facts of labels and classifiers in words, for the report, the gallery and the model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from cdul_steps.data.labels import LabelFacts

CHECKED = "## Checked by a person"
"""The heading of a model card's section on a check."""


def labels_in_words(facts: LabelFacts) -> dict[str, str]:
    """How pseudo-labels were made, from the facts of their table, by name of the setting.

    Operations that were not used, and facts that an older or external table lacks, are left out.
    """
    tau, scale = _number(facts.tau), facts.similarity.get("logit_scale")
    if tau and scale:
        times = f"{facts.tau * scale:.3g}"
        tau += " (the model's own)" if times == "1" else f" ({times} times the model's own)"
    found = {
        "construction": facts.construction,
        "scores": None,
        "tau": tau,
        "zeta": _number(facts.zeta),
        "lambda": _number(facts.lambda_),
    }
    if facts.joined:
        found["joined"] = "the mean of " + " and ".join(map(_part, facts.joined))
    if facts.logit_bias is not None:
        found["scores"] = f"a sigmoid of each class, with bias {_number(facts.logit_bias)}"
    if facts.context:
        names = len(facts.context)
        counted = f", which count as {facts.context_weight:g}" * (names > facts.context_weight)
        found["context"] = f"{names} names{counted}"
    if facts.grid:
        found["snippets"] = "those of the {} x {} grid".format(*facts.grid)
    if facts.statistics:
        found["classes"] = "standardised"
    if facts.bias is not None:
        found["positives"] = (
            f"{_number(facts.positives)}: calibrated so that the labels of an image sum to it on "
            f"average; logit times {_number(facts.slope)} plus {_number(facts.bias)}"
        )
    if facts.threshold is not None:
        found["hard"] = f"1 if at least {_number(facts.threshold)}, else 0"
    if facts.top_k is not None:
        found["hard"] = f"1 for the {facts.top_k} largest labels of an image, else 0"
    if facts.corrections:
        found["corrections"] = f"{facts.corrections} labels corrected by people"
    return {name: text for name, text in found.items() if text}


def checked_in_words(checked: Mapping[str, Any]) -> str:
    """Estimates from a person's answers, as in a classifier's card; empty if nobody checked it."""
    if not checked:
        return ""
    bounds = [
        "{} {:.0f} to {:.0f}".format(name, *(100 * checked[name][k] for k in (0, 2)))
        for name in ("precision", "recall")
        if checked.get(name)
    ]
    return f"checked on {checked['answers']} answers: {', '.join(bounds)} percent"


def percent(bounds: Sequence[float] | None) -> str:
    """The bounds of an estimate `[low, middle, high]` in 0..1, in percent."""
    if bounds is None:
        return "too few answers"
    low, _, high = (100 * part for part in bounds)
    return f"{low:.0f} to {high:.0f}"


def estimate_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The header and rows of an estimate from a person's answers: all classes, then each class."""
    rows = [
        [
            name,
            *(row[key] for key in ("answers", "yes", "named")),
            *(percent(row[key]) for key in ("precision", "recall", "f1", ap)),
        ]
        for name, row, ap in [
            ("all classes", found["all"], "mAP"),
            *((name, row, "AP") for name, row in found["classes"].items()),
        ]
    ]
    return ["class", "answers", "yes", "named", "precision", "recall", "F1", "AP"], rows


def estimate_in_words(found: Mapping[str, Any]) -> list[str]:
    """How to read the table of an estimate, in lines."""
    unknown = f", {found['unknown']} of them undecided" if found["unknown"] else ""
    return [
        f"From {found['answers']} answers to {found['asked']} questions{unknown}. In percent: the "
        f"true value lies between the two numbers in {100 * found['level']:.0f} of 100 checks.",
        f"AP of all classes is mAP. Most uncertain classes: {', '.join(found['next'])}.",
    ]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _part(facts: Mapping[str, Any]) -> str:
    """One of the labels that joined labels are the mean of."""
    similarity = facts.get("similarity") or {}
    of = f"{similarity['model']}'s " if "model" in similarity else ""
    views = " of second views" if similarity.get("second_views") else ""
    return of + str(facts.get("construction", "labels")).replace("_", " ") + views
