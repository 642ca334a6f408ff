"""Show one of the result tables in the terminal."""

import difflib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cdul_steps.data.foreign import ClassNames
from cdul_steps.data.tables import read_facts, read_scores, read_table
from cdul_steps.errors import UserError

THRESHOLD = 0.5
QUANTILES = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}


def show_table(file: Path, *, of_class: str | None, top: int, as_json: bool) -> str:
    """Summarise a table of scores, `images.parquet` or a table of an encode job.

    As text for people, or as JSON. `of_class` restricts scores to one class; the `top` images with
    the highest and with the lowest scores are listed. Raises UserError for another kind of table
    and an unknown class.
    """
    facts = read_facts(file)
    kind = facts.get("kind", "scores")
    if kind not in KINDS:
        raise UserError(f"{file}: is a table of kind {kind!r}; show reads {', '.join(KINDS)}")
    if of_class is not None and kind != "scores":
        raise UserError(
            f"{file}: --class needs a table of scores, but this one is of kind {kind!r}"
        )
    found = {"file": str(file), "kind": kind, **KINDS[kind](file, facts, of_class, top)}
    if as_json:
        return json.dumps(found, indent=2, ensure_ascii=False)
    return "\n".join([f"{file}: {kind}, {found['images']} images", *_lines(found)])


def _scores(file: Path, facts: dict[str, Any], of_class: str | None, top: int) -> dict[str, Any]:
    """Counts and quantiles per class; the images with the largest and the smallest scores.

    Without a class, each image is listed with its largest score.
    """
    table, classes, scores = read_scores(file)
    shown = classes if of_class is None else []
    if of_class is not None and (index := ClassNames(classes).find(of_class)) is not None:
        shown = [classes[index]]
    elif of_class is not None:
        near = difflib.get_close_matches(of_class, classes, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(classes[:8])}"
        raise UserError(f"{file}: no class {of_class!r}{hint}")
    if not len(scores):
        raise UserError(f"{file}: no image has scores")
    threshold = facts.get("threshold") or THRESHOLD
    columns = scores[:, [classes.index(name) for name in shown]]
    best_class, best = columns.argmax(axis=1), columns.max(axis=1)
    order = np.argsort(-best, kind="stable")

    def images(rows: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "score": float(best[row]),
                "class": shown[best_class[row]],
                **table.slice(row, 1).to_pylist()[0],
            }
            for row in rows.tolist()
        ]

    per_class = {
        name: {
            "count": int(np.count_nonzero(column >= np.float32(threshold))),
            "mean": float(column.mean(dtype=np.float64)),
            **_quantiles(column),
        }
        for name, column in zip(shown, columns.T, strict=True)
    }
    return {
        "images": len(scores),
        **_outcome(file, top),
        "threshold": threshold,
        "classes": per_class,
        "best": images(order[:top]),
        "worst": images(order[::-1][:top]),
    }


def _images(file: Path, facts: dict[str, Any], of_class: str | None, top: int) -> dict[str, Any]:
    """Images per split and, if the ground truth is known, per class."""
    columns = ["image_id", "split", "width", "height"]
    table = read_table(file, columns, ["known", "positive"])
    frame = table.to_pandas()
    nothing = pd.Series(None, frame.index, dtype=object)
    positive = frame.get("positive", nothing)
    known = positive.notna() & (frame.get("known", nothing) == True)  # noqa: E712
    classes = facts.get("classes", [])
    splits = {
        split: {
            "images": len(part),
            "unreadable": int((part["width"] == 0).sum()),
            "known": int(known[part.index].sum()),
            "megapixels": _quantiles((part["width"] * part["height"] / 1e6).to_numpy()),
        }
        for split, part in frame.groupby("split", sort=False)
    }
    positives: dict[str, dict[str, int]] = {name: dict.fromkeys(splits, 0) for name in classes}
    for split, row in zip(frame["split"][known], positive[known], strict=True):
        for c in row:
            positives[classes[c]][split] += 1
    unreadable = frame["image_id"][frame["width"] == 0].tolist()
    return {
        "images": len(frame),
        "splits": splits,
        "positives": positives,
        "unreadable": unreadable[:top],
    }


def _encode(file: Path, facts: dict[str, Any], of_class: str | None, top: int) -> dict[str, Any]:
    """The outcome of an encode job: statuses, the first failures, seconds per image."""
    table = read_table(file, ["image_id", "status"], ["seconds"])
    found = {"images": len(table), **_outcome(file, top)}
    if "seconds" in table.column_names:
        found["seconds"] = _quantiles(table["seconds"].to_numpy())
    return found


KINDS = {"scores": _scores, "images": _images, "encode": _encode, "features": _encode}


def _outcome(file: Path, top: int) -> dict[str, Any]:
    """Images by status, and the first failed images; empty for a table without statuses."""
    table = read_table(file, ["image_id"], ["status", "error"])
    if "status" not in table.column_names:
        return {}
    failed = table.filter(pa.array(s != "ok" for s in table["status"].to_pylist()))
    return {
        "statuses": dict(Counter(table["status"].to_pylist()).most_common()),
        "failed": failed.slice(0, top).to_pylist(),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), list(QUANTILES.values()))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _lines(found: dict[str, Any]) -> list[str]:
    """The findings as lines of text."""
    lines = []
    if "statuses" in found:
        counts = ", ".join(f"{count} {status}" for status, count in found["statuses"].items())
        lines += [f"status: {counts}"]
    for image in found.get("failed", []):
        text = " ".join([image["image_id"], image.get("error", "")])
        lines.append(f"  {image['status']}: {_printable(text).rstrip()}")
    if "seconds" in found:
        lines += ["", _table({"seconds per image": found["seconds"]})]
    if "splits" in found:
        rows = {
            split: {
                **{name: facts[name] for name in ("images", "unreadable", "known")},
                **{f"Mpx {name}": facts["megapixels"][name] for name in ("min", "median", "max")},
            }
            for split, facts in found["splits"].items()
        }
        lines += ["", _table(rows)]
        lines += [f"  unreadable: {_printable(name)}" for name in found["unreadable"]]
        if any(split["known"] for split in found["splits"].values()):
            lines += ["", "Images that show each class:", _table(found["positives"])]
    if "classes" in found:
        rows = {
            _printable(name): {
                f">= {found['threshold']:g}" if fact == "count" else fact: value
                for fact, value in facts.items()
            }
            for name, facts in found["classes"].items()
        }
        lines += ["", _table(rows)]
        for name in ("best", "worst"):
            lines += ["", f"{name}:"]
            lines += [
                f"  {i['score']:.4f}  {_printable(i['class'])}  {_printable(i['image_id'])}"
                for i in found[name]
            ]
    return lines


def _table(rows: dict[str, dict[str, Any]]) -> str:
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame.to_string(float_format="{:.3f}".format)


def _printable(name: str) -> str:
    """A name without characters that could control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
