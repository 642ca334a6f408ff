"""Stage train: the classifier, and its pseudo-labels as they are refined."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cdul_steps.config import Training
from cdul_steps.data.corrections import COLUMN, corrected_entries
from cdul_steps.data.files import digest, replacing
from cdul_steps.data.loader import Loader, TrainImages, batches
from cdul_steps.data.manifest import read_split
from cdul_steps.data.tables import describe, read_facts, read_scores, score_table, write_table
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.metrics import Difficult
from cdul_steps.models.classifier import Card, new_classifier, save_classifier, start_head
from cdul_steps.models.device import DTYPES, set_up, several_devices
from cdul_steps.models.label_table import AlignedLabels, FixedLabels, new_labels
from cdul_steps.models.ranks import Ranks, run_ranks
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import source_digest, versions
from cdul_steps.steps.truth import Truth

SOFTWARE = ("torch", "timm", "torchvision", "pillow")


def _learning_rate(settings: Training, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, of `steps` in all."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


def _optimizer(settings: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    return torch.optim.SGD(groups, momentum=0.9, **common)


class Trainer:
    """The state of a training: network, labels, and the optimiser of both."""

    def __init__(
        self,
        network: torch.nn.Module,
        card: Card,
        settings: Training,
        labels: FixedLabels,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.network = ranks.prepare(network.to(device))
        self.card, self.settings, self.labels, self.device = card, settings, labels, device
        self.ranks, self._training_network = ranks, ranks.wrap(self.network)
        groups = [{"params": list(self.network.parameters())}, *labels.parameter_groups()]
        self.optimizer = _optimizer(settings, groups)
        self.dtype = DTYPES[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.logits = torch.full_like(labels.labels, torch.nan)
        self.step = 0

    def _forward(self, network: torch.nn.Module, images: Tensor) -> Tensor:
        images = self.card.normalize(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return network(images).float()

    def train_epoch(self, data: Iterator[tuple[Tensor, Tensor]], steps: int, label: str) -> float:
        """One pass over the images; the mean loss of an image.

        `data` is this rank's part of every batch, `steps` are those of the whole training. Keeps
        each image's logits for the labels.
        """
        self.network.train()
        self.logits.fill_(torch.nan)
        total, count = torch.zeros((), device=self.device), 0
        spare = torch.zeros((1, 3, *[self.card.image_size] * 2), dtype=torch.uint8)
        with Progress(label, len(self.logits), "images") as progress:
            for index, images in data:
                index, mine = self.ranks.whole(index)
                if not len(index):
                    continue
                rate = _learning_rate(self.settings, self.step, steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1)
                if len(index) == 1:  # batch norm needs two
                    images = images.repeat(2, 1, 1, 1)
                # A rank that has none of the batch's images takes part with an earlier one, which
                # only batch norm sees.
                images = spare = images if len(images) else spare[:1]
                index = index.to(self.device, non_blocking=True)
                logits = self._forward(self._training_network, images)[: mine.stop - mine.start]
                logits = self.ranks.gather(logits, mine, len(index))
                loss = self.labels.loss(logits, index)
                self.optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss.mean()).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.logits[index] = logits.detach()
                total += loss.detach().sum()
                count += len(index)
                self.step += 1
                progress.update(len(index))
        return float(total) / max(count, 1)

    @torch.inference_mode()
    def predict(self, data: Iterator[tuple[Tensor, Tensor]], images: int) -> Tensor:
        """Probabilities float32 (images, C) on the CPU; 0 for an image that is unusable.

        `data` is this rank's part, the probabilities are those of all.
        """
        self.network.eval()
        scores = torch.zeros(images, len(self.card.classes))
        for index, pixels in data:
            if len(index):
                logits = self._forward(self.network, pixels)
                scores[index] = self.card.probabilities(logits).cpu()
        return self.ranks.sum(scores)

    def is_finite(self) -> bool:
        """Whether the network's weights and statistics are."""
        return all(bool(t.isfinite().all()) for t in self.network.state_dict().values())

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. Random numbers are seeded anew each epoch."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "latents": self.labels.latents.detach(),
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.labels.restore(state["latents"])
        self.step = state["step"]


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
