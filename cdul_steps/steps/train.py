"""Stage train: train the classifier and refine its pseudo-labels."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cdul_steps.config import Training
from cdul_steps.data.corrections import corrected_entries
from cdul_steps.data.files import digest, replacing
from cdul_steps.data.manifest import read_split
from cdul_steps.data.tables import describe, read_facts, read_scores, write_scores, write_table
from cdul_steps.data.truth import Truth
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.choices import Difficult
from cdul_steps.method.losses import LOSSES
from cdul_steps.models.classifier import (
    WEIGHTS,
    Card,
    load_classifier,
    network_and_card,
    save_classifier,
    start_head,
)
from cdul_steps.models.device import Machine
from cdul_steps.progress import note
from cdul_steps.provenance import source_digest, versions
from cdul_steps.training.features import FeatureLoader, read_features
from cdul_steps.training.head import HeadTrainer
from cdul_steps.training.labels import AlignedLabels, new_labels
from cdul_steps.training.loader import Loader, TrainImages, batches
from cdul_steps.training.ranks import Ranks, run_ranks
from cdul_steps.training.trainer import Trainer

SOFTWARE = ("torch", "timm", "torchvision", "pillow")


@dataclass(frozen=True)
class Inputs:
    """The input of a training: a table of labels, the manifest, and optional starting points.

    `features` are the stores of a frozen trunk, by split. `start` is the model folder of a
    classifier with the same network and classes, whose weights the training starts from.
    """

    labels: Path
    images: Path
    features: Mapping[str, Path] = field(default_factory=dict)
    start: Path | None = None


@dataclass(frozen=True)
class _Task:
    """The arguments of `train_classifier`, passed to each of its processes."""

    inputs: Inputs
    settings: Training
    difficult: Difficult
    max_pixels: int
    max_failed_share: float
    machine: Machine
    output: Path

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def identity(self) -> str:
        """Digest of everything that the training and its history depend on, except image bytes."""
        given, weights = self.inputs, Path(self.settings.weights or "")
        parts = [
            self.settings.model_dump_json(),
            digest(given.labels),
            digest(given.images),
            self.difficult,
            digest(weights) if weights.is_file() else "",
            *(digest(store) for _, store in sorted(given.features.items())),
            digest(given.start / WEIGHTS) if given.start else "",
            str(self.max_pixels),
            source_digest(__name__, train_classifier.__name__),
        ]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint, if it belongs to exactly this training.

    Raises UserError for a file that is not our checkpoint, because a new one would replace it.
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
        note("train: the checkpoint is from other settings, labels or images; starting over")
        return None
    return state


def train_classifier(
    *,
    inputs: Inputs,
    settings: Training,
    difficult: Difficult,
    max_pixels: int,
    max_failed_share: float,
    machine: Machine,
    output: Path,
) -> None:
    """Train a classifier on pseudo-labels, and refine the labels during training.

    The manifest's truth is only used for columns of `history.parquet` and never affects training.
    Writes to the folder `output`: `model/`, `history.parquet` (one row per epoch),
    `refined_labels.parquet`; while it runs, `checkpoint.pt`, from which a killed training resumes.
    The result is that of the final epoch. Raises UserError for inconsistent input, for a loss that
    is not finite, and if more than `max_failed_share` of the images cannot be read.

    On several GPUs (with the device cpu: processes) each takes part of every batch, and the result
    is the same as with one, except for rounding and dropout. On GPUs, batch norm is also computed
    over the whole batch; on a CPU this is not possible, and UserError is raised.

    With a frozen trunk, the last layer is trained on one CPU thread, which is fastest for such a
    small layer.
    """
    if settings.start_from and not inputs.start:
        raise UserError("training: start_from needs --start FOLDER, a classifier's model folder")
    frozen = settings.trunk == "frozen"
    machines = [Machine("cpu", threads=1, workers=0)] if frozen else machine.split()
    if not frozen:
        inputs = replace(inputs, features={})
    elif "train" not in inputs.features:
        raise UserError("training: a frozen trunk needs --features train=STORE of 'cdul features'")
    task = _Task(inputs, settings, difficult, max_pixels, max_failed_share, machines[0], output)
    if len(machines) == 1:
        _train(Ranks(), machines[0].device, task)
    else:
        run_ranks(_train, [each.device for each in machines], task=task)


def _train(ranks: Ranks, device: str, task: _Task) -> None:
    target, workers = replace(task.machine, device=device).set_up(cpu_workers=1)
    settings = task.settings
    table, classes, scores = read_scores(task.inputs.labels)
    trainer = _new_trainer(task, table, classes, scores, target, ranks)
    card, identity = trainer.card, task.identity()
    history = _resume(trainer, task, identity)
    if isinstance(trainer, HeadTrainer):
        loader: Loader | FeatureLoader = FeatureLoader(trainer.features)
    else:
        loader = _pixels(task, card, table, workers, target)
    truth = Truth.of(task.inputs.images, table["image_id"].to_pylist(), classes, task.difficult)
    test = _test_set(task, trainer, workers)
    steps = settings.epochs * len(batches(np.arange(len(table)), settings.batch_size))
    epochs = settings.epochs * trainer.rounds
    _note_start(trainer, len(table))
    for epoch in range(len(history), epochs):
        if epoch % settings.epochs == 0:
            trainer.begin_round(epoch // settings.epochs)
            if epoch:
                note(
                    "train: second round: a new head learns from labels halfway to the refined ones"
                )
        # Different for each rank, so that dropout does not repeat within a batch.
        torch.manual_seed(settings.seed * 1_000_003 + epoch + (ranks.rank << 40))
        shuffle = np.random.default_rng((settings.seed, epoch % settings.epochs))
        order = shuffle.permutation(len(table))
        plan = ranks.part(batches(order, settings.batch_size))
        before = trainer.labels.labels
        start = time.monotonic()
        loss = trainer.train_epoch(
            loader.epoch(epoch, plan), steps, f"train epoch {epoch + 1}/{epochs}"
        )
        seconds = time.monotonic() - start
        _check_epoch(task, trainer, table, epoch + 1, loss)
        trainer.move_labels(epoch % settings.epochs + 1)
        now = trainer.labels.labels
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
        _note_epoch(row, trainer.unusable)
        if epoch + 1 < epochs and not ranks.rank:
            _save_checkpoint(trainer, task, identity, history)
    _match_labels(trainer, loader, len(table))
    if not ranks.rank:
        _write_results(task.output, trainer, table, history)
        task.checkpoint.unlink(missing_ok=True)


def _new_trainer(
    task: _Task,
    table: pa.Table,
    classes: list[str],
    scores: np.ndarray,
    device: torch.device,
    ranks: Ranks,
) -> Trainer:
    """The initial network and labels of a training, from its table of labels."""
    settings = task.settings
    head = LOSSES[settings.loss].head
    if len(classes) == 1 and head == "softmax":
        raise UserError("training: a softmax over one class learns nothing; use the loss 'kl'")
    torch.manual_seed(settings.seed)
    network, card = network_and_card(
        settings.model_copy(update={"weights": None}) if task.inputs.start else settings,
        classes,
        threshold=settings.threshold,
        activation=head,
        provenance={
            "training": settings.model_dump(by_alias=True),
            "labels": {"digest": digest(task.inputs.labels), **read_facts(task.inputs.labels)},
            "software": versions(*SOFTWARE),
        },
    )
    corrected = torch.from_numpy(corrected_entries(table, classes)).to(device)
    labels = new_labels(torch.from_numpy(scores).to(device), corrected, settings)
    if task.inputs.features:
        rows = _rows(task.inputs.images, "train", table["image_id"].to_pylist())
        store = task.inputs.features["train"]
        return HeadTrainer(store, rows, network, card, settings, labels, task.output)
    if task.inputs.start:
        _start_from(network, card, task.inputs.start)
    else:
        start_head(network, labels.labels.cpu())
    return Trainer(network, card, settings, labels, device, ranks)


def _start_from(network: torch.nn.Module, card: Card, folder: Path) -> None:
    """Copy the weights of a classifier to a network; UserError if the networks differ."""
    first, its = load_classifier(folder, torch.device("cpu"))
    for key in ("model", "model_args", "classes"):
        if getattr(its, key) != getattr(card, key):
            raise UserError(
                f"{folder}: this classifier's {key} is {getattr(its, key)}, and this training's "
                f"{getattr(card, key)}: the training cannot start from it"
            )
    network.load_state_dict(first.state_dict())


def _resume(trainer: Trainer, task: _Task, identity: str) -> list[dict[str, Any]]:
    """Resume from this training's checkpoint, if there is one; returns the history so far."""
    state = _load_checkpoint(task.checkpoint, identity)
    if not state:
        return []
    try:
        history = json.loads(state["history"])
        trainer.begin_round((len(history) - 1) // task.settings.epochs)
        trainer.restore(state)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{task.checkpoint}: does not fit this training ({first_line(error)}); delete it and "
            "run again"
        ) from error
    epochs = task.settings.epochs * trainer.rounds
    note(f"train: resuming after epoch {len(history)} of {epochs}")
    return history


def _save_checkpoint(
    trainer: Trainer, task: _Task, identity: str, history: list[dict[str, Any]]
) -> None:
    state = {"identity": identity, "history": json.dumps(history), **trainer.state()}
    buffer = io.BytesIO()  # torch's own error on a full disk is not an OSError
    torch.save(state, buffer)
    with replacing(task.checkpoint) as part:
        part.write_bytes(buffer.getbuffer())


def _check_epoch(task: _Task, trainer: Trainer, table: pa.Table, epoch: int, loss: float) -> None:
    """Raise UserError if training cannot continue after `epoch` (from 1)."""
    if np.isfinite(loss) and trainer.unusable == len(table):
        first = table["path"][0].as_py()
        raise UserError(
            f"{task.inputs.labels}: none of its images can be read; the first is {first}"
        )
    if not (np.isfinite(loss) and trainer.is_finite()):
        kept = f"; the state before it is in {task.checkpoint}" if epoch > 1 else ""
        raise UserError(
            f"training diverged in epoch {epoch} (the loss is {loss}): "
            f"use a smaller learning_rate{kept}"
        )
    if trainer.unusable > task.max_failed_share * len(table):
        raise UserError(
            f"{task.inputs.labels}: {trainer.unusable} of its {len(table)} images cannot be read, "
            f"more than max_failed_share = {task.max_failed_share:g} allows; run 'cdul "
            "retry-failed' once they can be read"
        )


def _note_start(trainer: Trainer, images: int) -> None:
    settings, alignment = trainer.settings, trainer.settings.alignment
    parameters = sum(p.numel() for p in trainer.network.parameters())
    several = f"{trainer.ranks.count} x " if trainer.ranks.count > 1 else ""
    note(
        f"train: {settings.model} ({parameters / 1e6:.1f} M parameters) on "
        f"{several}{trainer.device}, {images} images, {len(trainer.card.classes)} classes, "
        f"{settings.epochs * trainer.rounds} epochs"
    )
    if isinstance(trainer.labels, AlignedLabels) and alignment.warmup >= settings.epochs:
        note(
            f"train: the labels will not change: alignment.warmup ({alignment.warmup}) is not "
            f"below epochs ({settings.epochs})"
        )


def _note_epoch(row: dict[str, Any], unusable: int) -> None:
    if unusable:
        note(f"train: epoch {row['epoch']}: {unusable} images cannot be read and are left out")
    note(
        f"train: epoch {row['epoch']}: loss {row['loss']:.4f}, label movement "
        f"{row['label_movement']:.4f}, {row['images_per_second']:.1f} images/s"
        + "".join(
            f", {name.replace('_', ' ')} {row[name]:.2f}"
            for name in ("label_mAP", "test_mAP")
            if row[name] is not None
        )
    )


def _array(scores: Tensor) -> np.ndarray:
    return scores.cpu().numpy()


def _rows(images: Path, split: str, image_ids: list[str]) -> np.ndarray:
    """The rows of some images of a split. Raises UserError for an image that is not in it."""
    table = read_split(images, split, ["image_id", "row"])
    rows = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    if absent := [image_id for image_id in image_ids if image_id not in rows]:
        raise UserError(f"{images}: has no image {absent[0]!r} in split {split!r}; the labels do")
    return np.array([rows[image_id] for image_id in image_ids], int)


def _pixels(task: _Task, card: Card, table: pa.Table, workers: int, device: torch.device) -> Loader:
    paths = table["path"].combine_chunks()
    return Loader(TrainImages(paths, card.resize, task.settings, task.max_pixels), workers, device)


def _test_set(
    task: _Task, trainer: Trainer, workers: int
) -> Callable[[Trainer], float | None] | None:
    """A function from a trainer to its mAP on the test split; None if nothing is known."""
    try:
        table = read_split(task.inputs.images, "test", ["image_id", "path"])
    except UserError:
        return None
    names, card = table["image_id"].to_pylist(), trainer.card
    truth = Truth.of(task.inputs.images, names, card.classes, task.difficult)
    if not len(truth.places):
        return None
    if isinstance(trainer, HeadTrainer):
        if "test" not in task.inputs.features:
            return None
        rows = _rows(task.inputs.images, "test", names)
        features = read_features(task.inputs.features["test"], rows, task.output)
        loader: Loader | FeatureLoader = FeatureLoader(trainer.standardise(features, task.output))
    else:
        loader = _pixels(task, card, table, workers, trainer.device)
    return lambda trainer: truth.mean_average_precision(
        _array(card.probabilities(_logits(trainer, loader, len(table))).nan_to_num())
    )


def _logits(trainer: Trainer, loader: Loader | FeatureLoader, images: int) -> Tensor:
    """The network's current logits for all images of a loader; see `Trainer.predict`."""
    plan = batches(np.arange(images), max(trainer.settings.batch_size, 32))
    return trainer.predict(loader.epoch(-1, trainer.ranks.part(plan)), images)


def _match_labels(trainer: Trainer, loader: Loader | FeatureLoader, images: int) -> None:
    """Rescale the network so that it predicts as many classes as the soft labels.

    Hard labels and softmax outputs do not indicate how many classes an image shows.
    """
    settings = trainer.settings
    if trainer.card.activation != "sigmoid" or settings.positives != "soft":
        return
    matched = trainer.match_labels(_logits(trainer, loader, images))
    if matched is None:
        note(
            "train: the last layer is not a linear layer with a bias, so the probabilities are not "
            "rescaled"
        )
    else:
        note(
            f"train: rescaled the classifier (logits times {matched[0]:.3g}, {matched[1]:+.3g}), "
            "so that it predicts as many classes as the labels have"
        )


def _write_results(
    output: Path, trainer: Trainer, table: pa.Table, history: list[dict[str, Any]]
) -> None:
    card = trainer.card
    refined = _array(trainer.labels.labels)
    facts = {"classes": card.classes, **card.provenance}
    save_classifier(trainer.finished_network(), card, output / "model")
    write_scores(table, card.classes, refined, output / "refined_labels.parquet", **card.provenance)
    types = {"epoch": pa.int32()}
    columns = {n: pa.array([r[n] for r in history], types.get(n, pa.float64())) for n in history[0]}
    write_table(describe(pa.table(columns), "history", **facts), output / "history.parquet")
