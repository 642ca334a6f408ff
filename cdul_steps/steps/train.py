"""Stage train: the classifier, and its pseudo-labels as they are refined."""

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cdul_steps.config import Training
from cdul_steps.data.corrections import COLUMN, corrected_entries
from cdul_steps.data.files import digest, replacing
from cdul_steps.data.manifest import read_split
from cdul_steps.data.tables import describe, read_facts, read_scores, score_table, write_table
from cdul_steps.data.truth import Truth
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.metrics import Difficult
from cdul_steps.models.classifier import Card, new_classifier, save_classifier, start_head
from cdul_steps.models.device import set_up, several_devices
from cdul_steps.progress import note
from cdul_steps.provenance import source_digest, versions
from cdul_steps.training.labels import AlignedLabels, new_labels
from cdul_steps.training.loader import Loader, TrainImages, batches
from cdul_steps.training.ranks import Ranks, run_ranks
from cdul_steps.training.trainer import Trainer

SOFTWARE = ("torch", "timm", "torchvision", "pillow")


def _identity(
    settings: Training, labels: str, images: Path, difficult: Difficult, max_pixels: int
) -> str:
    """Digest of all that a training and its history depend on, the images' own bytes aside.

    `labels` is the digest of the labels.
    """
    weights = Path(settings.weights or "")
    parts = [
        settings.model_dump_json(),
        labels,
        digest(images),
        difficult,
        digest(weights) if weights.is_file() else "",
        str(max_pixels),
        source_digest(__name__, train_classifier.__name__),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint, if it is one of this very training.

    Raises UserError for a file that is no checkpoint of ours: a new one would replace it.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: not a readable checkpoint; delete it, or give another --output"
        ) from error
    if not isinstance(state, dict) or "identity" not in state:
        raise UserError(f"{path}: not a checkpoint of 'cdul train'; give another --output")
    if state["identity"] != identity:
        note("train: the checkpoint is of other settings, labels or images; starting over")
        return None
    return state


def train_classifier(
    *,
    labels: Path,
    images: Path,
    settings: Training,
    difficult: Difficult,
    max_pixels: int,
    device: str,
    devices: int = 1,
    workers: int,
    threads: int,
    output: Path,
) -> None:
    """Learn a classifier from pseudo-labels, and refine them as it learns.

    `labels` is a table of scores with the class table, `images` the manifest, whose truth is
    read for the columns of `history.parquet` alone and never touches learning. Writes in the
    folder `output`: `model/`, `history.parquet` (a row an epoch), `refined_labels.parquet`;
    while it runs, `checkpoint.pt`, from which a killed training goes on. The final epoch is what
    counts. Raises UserError for input that does not fit and for a loss that is not finite.

    On several `devices` (GPUs, or with `device` cpu processes) each takes its part of every batch,
    and the result is that of one, but for rounding and dropout. Batch norm is over the whole batch
    too, on GPUs; on a CPU, where it cannot be, UserError is raised.
    """
    arguments: dict[str, Any] = {
        "labels": labels,
        "images": images,
        "settings": settings,
        "difficult": difficult,
        "max_pixels": max_pixels,
        "workers": workers,
        "threads": threads,
        "output": output,
    }
    names = several_devices(device, devices) if devices > 1 else [device]
    if len(names) == 1:
        return _train(Ranks(), names[0], **arguments)
    # Of what there is, each gets its share.
    arguments["threads"] = max(1, (threads or torch.get_num_threads()) // len(names))
    arguments["workers"] = -(-workers // len(names)) if workers > 0 else workers
    run_ranks(_train, names, **arguments)


def _train(
    ranks: Ranks,
    device: str,
    *,
    labels: Path,
    images: Path,
    settings: Training,
    difficult: Difficult,
    max_pixels: int,
    workers: int,
    threads: int,
    output: Path,
) -> None:
    target, workers = set_up(device, threads, workers, cpu_workers=1)
    table, classes, scores = read_scores(labels)
    if len(classes) == 1 and settings.loss == "kl_classes":
        raise UserError("training: a softmax over one class learns nothing; use the loss 'kl'")
    labels_digest = digest(labels)
    identity = _identity(settings, labels_digest, images, difficult, max_pixels)
    checkpoint = output / "checkpoint.pt"

    torch.manual_seed(settings.seed)
    network, data = new_classifier(settings.model, classes, settings.model_args, settings.weights)
    card = Card(
        model=settings.model,
        model_args=settings.model_args,
        classes=classes,
        image_size=settings.image_size,
        mean=list(data["mean"]),
        std=list(data["std"]),
        interpolation=data["interpolation"],
        threshold=settings.threshold,
        activation="softmax" if settings.loss == "kl_classes" else "sigmoid",
        provenance={
            "training": settings.model_dump(by_alias=True),
            "labels": {"digest": labels_digest, **read_facts(labels)},
            "software": versions(*SOFTWARE),
        },
    )
    corrected = torch.from_numpy(corrected_entries(table, classes)).to(target)
    label_table = new_labels(torch.from_numpy(scores).to(target), corrected, settings)
    start_head(network, label_table.labels.cpu())
    trainer = Trainer(network, card, settings, label_table, target, ranks)
    history: list[dict[str, Any]] = []
    if state := _load_checkpoint(checkpoint, identity):
        try:
            trainer.restore(state)
            history = json.loads(state["history"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"{checkpoint}: does not fit this training ({first_line(error)}); delete it and "
                "run again"
            ) from error
        note(f"train: going on after epoch {len(history)} of {settings.epochs}")

    train_images = TrainImages(table["path"].combine_chunks(), card.resize, settings, max_pixels)
    loader = Loader(train_images, workers, target)
    truth = Truth.of(images, table["image_id"].to_pylist(), classes, difficult)
    test = _test_set(images, classes, card, settings, difficult, max_pixels, workers, target, ranks)
    steps = settings.epochs * len(batches(np.arange(len(table)), settings.batch_size))
    parameters = sum(p.numel() for p in network.parameters())
    note(
        f"train: {settings.model} ({parameters / 1e6:.1f} M parameters) on "
        f"{f'{ranks.count} x ' if ranks.count > 1 else ''}{target}, "
        f"{len(table)} images, {len(classes)} classes, {settings.epochs} epochs"
    )
    if isinstance(label_table, AlignedLabels) and settings.alignment.warmup >= settings.epochs:
        note(
            f"train: the labels will stay as they are: alignment.warmup "
            f"({settings.alignment.warmup}) is not below epochs ({settings.epochs})"
        )
    for epoch in range(len(history), settings.epochs):
        # Of its own for each rank, so that dropout does not repeat itself within a batch.
        torch.manual_seed(settings.seed * 1_000_003 + epoch + (ranks.rank << 40))
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(table))
        plan = ranks.part(batches(order, settings.batch_size))
        before = label_table.labels
        start = time.monotonic()
        loss = trainer.train_epoch(
            loader.epoch(epoch, plan), steps, f"train epoch {epoch + 1}/{settings.epochs}"
        )
        seconds = time.monotonic() - start
        unusable = int(trainer.logits.isnan().all(dim=1).sum())
        if np.isfinite(loss) and unusable == len(table):
            first = table["path"][0].as_py()
            raise UserError(f"{labels}: none of its images can be read, the first being {first}")
        if not (np.isfinite(loss) and trainer.is_finite()):
            kept = f"; the state before it is in {checkpoint}" if history else ""
            raise UserError(
                f"training diverged in epoch {epoch + 1} (the loss is {loss}): "
                f"use a smaller learning_rate{kept}"
            )
        label_table.end_epoch(epoch + 1, trainer.logits)
        now = label_table.labels
        row = {
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "label_movement": float((now - before).abs().mean()),
            "train_mAP": truth.mean_average_precision(_array(card.probabilities(trainer.logits))),
            "images_per_second": len(table) / seconds,
            "label_mAP": truth.mean_average_precision(_array(now)),
            "test_mAP": test(trainer) if test else None,
        }
        history.append(row)
        if unusable:
            note(f"train: epoch {epoch + 1}: {unusable} images cannot be read and are left out")
        note(
            f"train: epoch {epoch + 1}: loss {loss:.4f}, label movement "
            f"{row['label_movement']:.4f}, {row['images_per_second']:.1f} images/s"
            + "".join(
                f", {name.replace('_', ' ')} {row[name]:.2f}"
                for name in ("label_mAP", "test_mAP")
                if row[name] is not None
            )
        )
        if epoch + 1 < settings.epochs and not ranks.rank:
            state = {"identity": identity, "history": json.dumps(history), **trainer.state()}
            buffer = io.BytesIO()  # torch's own error on a full disk is not an OSError
            torch.save(state, buffer)
            with replacing(checkpoint) as part:
                part.write_bytes(buffer.getbuffer())
    if not ranks.rank:
        _write_results(output, trainer, table, history)
        checkpoint.unlink(missing_ok=True)


def _array(scores: Tensor) -> np.ndarray:
    return scores.cpu().numpy()


def _test_set(
    images: Path,
    classes: list[str],
    card: Card,
    settings: Training,
    difficult: Difficult,
    max_pixels: int,
    workers: int,
    device: torch.device,
    ranks: Ranks,
) -> Callable[[Trainer], float | None] | None:
    """A function from a trainer to its mAP on the test split; None where nothing is known."""
    try:
        table = read_split(images, "test", ["image_id", "path"])
    except UserError:
        return None
    truth = Truth.of(images, table["image_id"].to_pylist(), classes, difficult)
    if not len(truth.places):
        return None
    data = TrainImages(table["path"].combine_chunks(), card.resize, settings, max_pixels)
    loader = Loader(data, workers, device)
    plan = ranks.part(batches(np.arange(len(table)), max(settings.batch_size, 32)))
    return lambda trainer: truth.mean_average_precision(
        _array(trainer.predict(loader.epoch(-1, plan), len(table)))
    )


def _write_results(
    output: Path, trainer: Trainer, table: pa.Table, history: list[dict[str, Any]]
) -> None:
    card = trainer.card
    refined = _array(trainer.labels.labels)
    facts = {"classes": card.classes, **card.provenance}
    save_classifier(trainer.network, card, output / "model")
    scores = score_table(table["image_id"], table["path"], card.classes, refined)
    if COLUMN in table.column_names:
        scores = scores.append_column(COLUMN, table[COLUMN])
    write_table(describe(scores, "scores", **facts), output / "refined_labels.parquet")
    types = {"epoch": pa.int32()}
    columns = {n: pa.array([r[n] for r in history], types.get(n, pa.float64())) for n in history[0]}
    write_table(describe(pa.table(columns), "history", **facts), output / "history.parquet")
