"""Stage predict: apply only the classifier, to any images."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from cdul_steps.data.files import check_names, digest, replacing
from cdul_steps.data.foreign import listed
from cdul_steps.data.manifest import read_present, read_split
from cdul_steps.data.readers import READERS
from cdul_steps.data.tables import describe, read_facts, score_table, write_csv, write_table
from cdul_steps.data.truth import thresholds_of
from cdul_steps.errors import UserError
from cdul_steps.models.classifier import WEIGHTS, Card, load_classifier
from cdul_steps.models.device import InBatches, Machine
from cdul_steps.models.embedding import ImageViews, encode_images
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.timm_encoder import TOGETHER, TimmEncoder
from cdul_steps.progress import note
from cdul_steps.provenance import versions
from cdul_steps.training.features import read_features

FORMATS = (".parquet", ".csv", ".json")
COLUMNS = ["image_id", "path", "row"]
_NAMED = 10
"""Number of failed images that the log names."""
_ARCHIVES = {".tar": "webdataset", ".parquet": "parquet"}


@dataclass(frozen=True)
class SplitImages:
    """The images of a split of the manifest `images`, and their `features`, if available.

    The features come from the classifier's own trunk, so that only its last layer is computed.
    """

    images: Path
    split: str
    features: Path | None = None


@dataclass(frozen=True)
class ShardImages:
    """The images of a shard, given by its `manifest`, that are still in the manifest `images`."""

    manifest: Path
    images: Path


def _listed(inputs: Sequence[Path]) -> pa.Table:
    """`image_id, path` of files, and of all images in folders and archives."""
    ids: list[str] = []
    paths: list[str] = []
    for item in inputs:
        if not item.exists():
            raise UserError(f"{item}: no such file or folder")
        reader = "folder" if item.is_dir() else _ARCHIVES.get(item.suffix)
        if not reader:
            ids.append(item.as_posix())
            paths.append(item.as_posix())
            continue
        found = READERS[reader](item, {"": "."}, (), lambda line: note(f"predict: {line}"))
        if not found:
            raise UserError(f"{item}: no image in this {'folder' if item.is_dir() else 'file'}")
        top = item if item.is_dir() else item.parent
        ids += ((top / record.image_id).as_posix() for record in found)
        paths += (record.path for record in found)
    check_names(paths)
    return pa.table({"image_id": pa.array(ids), "path": pa.array(paths)})


def predict_images(
    *,
    model: Path,
    inputs: Sequence[Path] | SplitImages | ShardImages,
    output: Path,
    threshold: float | None,
    max_pixels: int,
    machine: Machine,
) -> None:
    """Score images: files, folders and archives, or those of a manifest or of one of its shards.

    Writes Parquet, CSV or JSON by the suffix of `output`: `image_id, path`, one float32 probability
    per class, `labels` (names of the classes at or above their threshold) and `status`. An unusable
    image keeps its row, without scores. An earlier CSV or JSON file is never replaced. Raises
    UserError for an invalid model folder, and if none of the images can be used.
    """
    _check_output(output)
    target, workers = machine.set_up(cpu_workers=0)
    network, card = load_classifier(model, target)
    features = None
    if isinstance(inputs, SplitImages):
        table, features = read_split(inputs.images, inputs.split, COLUMNS), inputs.features
    elif isinstance(inputs, ShardImages):
        _, table = read_present(inputs.manifest, inputs.images)
    else:
        table = _listed(inputs)
    logits = np.full((len(table), len(card.classes)), np.nan, np.float32)
    if features:
        rows = read_features(features, table["row"].to_numpy(), output.parent)
        with torch.inference_mode():
            logits[:] = network.cpu().get_classifier()(torch.from_numpy(rows)).numpy()
    # Images without features, or to find out why an image has none.
    left = np.flatnonzero(np.isnan(logits).any(axis=1))
    status, error = np.full(len(table), "ok", object), np.full(len(table), "", object)
    if len(left):
        paths = table["path"].combine_chunks().take(pa.array(left))
        encoder = TimmEncoder(network, card, target)
        logits[left], status[left], error[left] = _score(
            encoder, paths, max_pixels, machine, workers
        )
    scores = card.probabilities(torch.from_numpy(logits)).numpy()
    if threshold is not None:
        card = replace(card, threshold=threshold, thresholds={})
    limits = thresholds_of(asdict(card), card.classes)
    result = score_table(table["image_id"], table["path"], card.classes, scores)
    named = [[card.classes[c] for c in np.flatnonzero(row >= limits)] for row in scores]
    result = result.append_column("labels", pa.array(named, pa.list_(pa.string())))
    result = result.append_column("status", pa.array(status))
    failed = Counter(s for s in status if s != "ok")
    for place in np.flatnonzero(status != "ok")[:_NAMED]:
        detail = f" ({error[place]})" if error[place] else ""
        note(f"predict: {table['path'][int(place)].as_py()}: {status[place]}{detail}")
    if failed.total() > _NAMED:
        note("predict: ...; the column 'status' has all of them")
    why = f" ({listed(failed)})" if failed else ""
    if len(table) and failed.total() == len(table) and not isinstance(inputs, ShardImages):
        raise UserError(f"predict: none of the {len(table)} images can be used{why}")
    _write(result, output, card, digest(model / WEIGHTS))
    note(
        f"predict: {len(table) - failed.total()} images ok, {failed.total()} failed{why}; {output}"
    )


def _check_output(output: Path) -> None:
    """Raise UserError for a name of another format, and for a file that a person may own."""
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: the name must end in .parquet, .csv or .json")
    if not output.exists():
        return
    if output.suffix != ".parquet":
        raise UserError(f"{output}: exists already; move it, or give another --output")
    with suppress(UserError):
        if {"kind", "weights", "model"} <= read_facts(output).keys():
            return
    raise UserError(f"{output}: is not a table of predictions; give another --output")


def _joined(names: Sequence[str]) -> str:
    """Names separated by semicolons; a name that contains a semicolon or a quote is quoted."""
    quoted = ('"' + n.replace('"', '""') + '"' if ";" in n or '"' in n else n for n in names)
    return "; ".join(quoted)


def _score(
    encoder: TimmEncoder, paths: pa.Array, max_pixels: int, machine: Machine, workers: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Logits float32 (N, C) of image files, NaN where a status is not "ok"; statuses; errors."""
    workers = min(workers, len(paths) // TOGETHER)
    choice = choose_engine(
        encoder,
        machine.engine,
        machine.batch_size,
        views=TOGETHER,
        work=len(paths) / max(1, workers),
    )
    encode = InBatches(choice.encoder, choice.batch_size, "predict")
    in_workers = encode if encoder.device.type == "cpu" else None
    images = ImageViews(paths, None, encoder.preprocess, max_pixels, in_workers)
    classes = encode(np.zeros((1, 3, *encoder.preprocess.size), np.uint8)).shape[1]
    rows = np.full((len(paths), 1, classes), np.nan, np.float32)
    outcome, _ = encode_images(
        images, encode, encoder, rows, np.arange(len(paths)), workers, TOGETHER
    )
    return rows[:, 0], [status for status, _, _ in outcome], [error for _, error, _ in outcome]


def _write(result: pa.Table, output: Path, card: Card, weights: str) -> None:
    if output.suffix == ".parquet":
        described = describe(
            result,
            "scores",
            classes=card.classes,
            threshold=card.threshold,
            **({"thresholds": card.thresholds} if card.thresholds else {}),
            model=card.model,
            weights=weights,
            software=versions("torch", "timm", "pillow"),
        )
        write_table(described, output)
        return
    frame: pd.DataFrame = result.to_pandas()
    with replacing(output) as part:
        if output.suffix == ".csv":
            frame["labels"] = frame["labels"].map(_joined)
            write_csv(frame, part)
        else:
            frame.to_json(part, orient="records", indent=1, force_ascii=False)
