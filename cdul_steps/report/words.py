"""How pseudo-labels were made, in words: for the report, the gallery and the model card."""

from typing import Any


def labels_in_words(facts: dict[str, Any]) -> dict[str, str]:
    """What the facts of a table of pseudo-labels say of their making, by name of the setting.

    What was not done, and what an older or foreign table does not say, is left out.
    """
    found = {"construction": facts.get("construction")}
    found |= {name: _number(facts.get(name)) for name in ("tau", "zeta", "lambda")}
    scale = facts.get("similarity", {}).get("logit_scale")
    if found["tau"] and scale:
        times = f"{facts['tau'] * scale:.3g}"
        found["tau"] += (
            " (the model's own)" if times == "1" else f" ({times} times the model's own)"
        )
    if facts.get("grid"):
        found["snippets"] = "those of the {} x {} grid".format(*facts["grid"])
    if facts.get("statistics"):
        found["classes"] = "standardised"
    if facts.get("bias") is not None:
        found["positives"] = (
            f"{_number(facts['positives'])}: calibrated so that an image's labels sum to it on the "
            f"mean; logit times {_number(facts['slope'])} plus {_number(facts['bias'])}"
        )
    if facts.get("threshold") is not None:
        found["hard"] = f"1 from {_number(facts['threshold'])} on, else 0"
    if facts.get("top_k") is not None:
        found["hard"] = f"1 for the {facts['top_k']} largest of an image, else 0"
    if facts.get("corrections"):
        found["corrections"] = f"{facts['corrections']} labels by people"
    return {name: text for name, text in found.items() if text}


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"
