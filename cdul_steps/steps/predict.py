"""Stage predict: the classifier alone, on any images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from cdul_steps.data.files import check_names, digest, replacing
from cdul_steps.data.foreign import listed
from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_split
from cdul_steps.data.readers.folder import read_folder
from cdul_steps.data.tables import describe, score_table, write_csv, write_table
from cdul_steps.errors import UserError
from cdul_steps.models.classifier import WEIGHTS, Card, load_classifier
from cdul_steps.models.device import InBatches, Machine
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

FORMATS = (".parquet", ".csv", ".json")
BATCH_SIZE = 32
"""Images per forward pass, where the machine does not say."""


class PredictImages(Dataset):
    """Images as the classifier takes them."""

    def __init__(self, paths: pa.Array, card: Card, max_pixels: int) -> None:
        self.paths, self.card, self.max_pixels = paths, card, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, str]:
        """`(index, uint8 (3, H, W) or None, status)`."""
        try:
            image = decode(Path(self.paths[index].as_py()), max_pixels=self.max_pixels)
        except ImageError as error:
            return index, None, str(error.status)
        return index, self.card.resize(image), "ok"


def _listed(inputs: Sequence[Path]) -> pa.Table:
    """`image_id, path` of files, and of all images below folders."""
    paths: list[str] = []
    for item in inputs:
        if item.is_dir():
            found = read_folder(item, {"": "."}, (), lambda line: note(f"predict: {line}"))
            if not found:
                raise UserError(f"{item}: no image in this folder")
            paths += [record.path for record in found]
        elif item.exists():
            paths.append(item.as_posix())
        else:
            raise UserError(f"{item}: no such file or folder")
    check_names(paths)
    return pa.table({"image_id": pa.array(paths), "path": pa.array(paths)})


def predict_images(
    *,
    model: Path,
    inputs: Sequence[Path],
    images: Path | None,
    split: str | None,
    output: Path,
    threshold: float | None,
    max_pixels: int,
    machine: Machine,
) -> None:
    """Score images: files and folders (`inputs`), or a split of the manifest `images`.

    Writes Parquet, CSV or JSON by the suffix of `output`: `image_id, path`, a float32 probability
    a class, `labels` (names of the classes at or above the threshold) and `status`. An unusable
    image keeps its row, without scores. Raises UserError for a model folder that is not one.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: the name must end in {', '.join(FORMATS)}")
    target, workers = machine.set_up(cpu_workers=1)
    batch_size = machine.batch_size or BATCH_SIZE
    network, card = load_classifier(model, target)
    table = read_split(images, split, ["image_id", "path"]) if images else _listed(inputs)
    loader = DataLoader(
        PredictImages(table["path"].combine_chunks(), card, max_pixels),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
    )
    score = InBatches(
        lambda pixels: (
            card.probabilities(network(card.normalize(pixels.to(target))).float()).cpu().numpy()
        ),
        batch_size,
        "predict",
    )
    scores = np.full((len(table), len(card.classes)), np.nan, np.float32)
    status = ["ok"] * len(table)
    with Progress("predict", len(table), "images") as progress, torch.inference_mode():
        for items in loader:
            for index, _, outcome in items:
                status[index] = outcome
            usable = [(index, pixels) for index, pixels, _ in items if pixels is not None]
            if usable:
                index, pixels = zip(*usable, strict=True)
                scores[list(index)] = score(np.stack(pixels))
                for place in index:
                    if not np.isfinite(scores[place]).all():
                        scores[place], status[place] = np.nan, "not_finite"
            progress.update(len(items))
    threshold = card.threshold if threshold is None else threshold
    result = score_table(table["image_id"], table["path"], card.classes, scores)
    named = [[card.classes[c] for c in np.flatnonzero(row >= threshold)] for row in scores]
    result = result.append_column("labels", pa.array(named, pa.list_(pa.string())))
    result = result.append_column("status", pa.array(status))
    _write(result, output, card, threshold, digest(model / WEIGHTS))
    failed = Counter(s for s in status if s != "ok")
    why = f" ({listed(failed)})" if failed else ""
    note(
        f"predict: {len(table) - failed.total()} images ok, {failed.total()} failed{why}; {output}"
    )


def _joined(names: Sequence[str]) -> str:
    """Names with a semicolon between them; one that has a semicolon or a quote itself is quoted."""
    quoted = ('"' + n.replace('"', '""') + '"' if ";" in n or '"' in n else n for n in names)
    return "; ".join(quoted)


def _write(result: pa.Table, output: Path, card: Card, threshold: float, weights: str) -> None:
    if output.suffix == ".parquet":
        described = describe(
            result,
            "scores",
            classes=card.classes,
            threshold=threshold,
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
