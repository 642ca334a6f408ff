"""Stage train: the classifier and its pseudo-labels, by gradient alignment."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdul_steps.config import Training
from cdul_steps.data.corrections import COLUMN, UNKNOWN, corrected_entries
from cdul_steps.data.files import digest, replacing
from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_split, read_truth
from cdul_steps.data.tables import describe, read_facts, read_scores, score_table, write_table
from cdul_steps.errors import UserError, first_line
from cdul_steps.method import gradient_alignment as alignment
from cdul_steps.method.metrics import Difficult, mean_average_precision, truth_table
from cdul_steps.models.classifier import Card, new_classifier, save_classifier
from cdul_steps.models.device import DTYPES, set_up
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import source_digest, versions

SOFTWARE = ("torch", "timm", "torchvision", "pillow")


class TrainImages(Dataset):
    """Images with their augmentation, which depends on seed, epoch and image alone."""

    def __init__(self, paths: pa.Array, card: Card, settings: Training, max_pixels: int) -> None:
        self.paths, self.card, self.max_pixels = paths, card, max_pixels
        self.settings = settings

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, np.ndarray] | None:
        """`(index, uint8 (3, H, W))` of image `index` in `epoch`; None if it is unusable.

        Epoch -1 is without augmentation.
        """
        epoch, index = key
        try:
            image = decode(Path(self.paths[index].as_py()), max_pixels=self.max_pixels)
        except ImageError:
            return None
        if epoch < 0:
            return index, self.card.resize(image)
        random = np.random.default_rng((self.settings.seed, epoch, index))
        pixels = self.card.resize(image, self._crop(image.size, random))
        if self.settings.flip and random.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        return index, pixels

    def _crop(self, size: tuple[int, int], random: np.random.Generator) -> tuple[float, ...] | None:
        """A box of the image's own shape with a share of its area in crop_scale..1."""
        if self.settings.crop_scale == 1:
            return None
        side = random.uniform(self.settings.crop_scale, 1) ** 0.5
        width, height = size[0] * side, size[1] * side
        x, y = random.uniform(0, size[0] - width), random.uniform(0, size[1] - height)
        return x, y, x + width, y + height


def _collate(items: list[tuple[int, np.ndarray] | None]) -> tuple[Tensor, Tensor] | None:
    usable = [item for item in items if item is not None]
    if not usable:
        return None
    index, pixels = zip(*usable, strict=True)
    return torch.tensor(index), torch.from_numpy(np.stack(pixels))


def batches(order: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut an order into batches; a last batch of one joins its neighbour, for batch norm."""
    cut = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        last = cut.pop()
        cut[-1] = cut[-1] + last
    return cut


class Loader:
    """Hands over batches of images, epoch after epoch, from the same worker processes."""

    def __init__(self, images: TrainImages, workers: int, device: torch.device) -> None:
        self._plan: list[list[tuple[int, int]]] = []
        self._loader = DataLoader(
            images,
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_collate,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Its own, so that dropout does not depend on the number of workers or on a resumption.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, plan: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `plan`, lists of image indices, as `(index (B,), uint8 images)`."""
        self._plan[:] = [[(epoch, index) for index in batch] for batch in plan]
        return (batch for batch in self._loader if batch is not None)


@dataclass(frozen=True)
class Measure:
    """Ground truth of some images, kept apart from learning, to measure scores on."""

    places: np.ndarray
    truth: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(
        cls, images: Path, image_ids: list[str], classes: list[str], difficult: Difficult
    ) -> "Measure":
        """The truth of those of the images whose truth is known."""
        table = read_truth(images, classes)
        known = {name: i for i, name in enumerate(table["image_id"].to_pylist())}
        places = [i for i, name in enumerate(image_ids) if name in known]
        table = table.take(pa.array([known[image_ids[i]] for i in places], pa.int64()))
        lists = [[entry or [] for entry in table[n].to_pylist()] for n in ("positive", "difficult")]
        truth, counted = truth_table(*lists, len(classes), difficult)
        return cls(np.array(places, dtype=int), truth, counted)

    def __call__(self, scores: Tensor) -> float | None:
        """mAP in percent of scores (N, C), NaN counting as 0; None where nothing is known."""
        known = scores.nan_to_num().numpy()[self.places]
        return mean_average_precision(self.truth, self.counted, known)


def _learning_rate(settings: Training, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0, of `steps` in all."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


def _optimizer(settings: Training, network: torch.nn.Module) -> torch.optim.Optimizer:
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **common)
    return torch.optim.SGD(network.parameters(), momentum=0.9, **common)


class Trainer:
    """The state of a training: network, optimiser, latents; and the two steps in turn."""

    def __init__(
        self,
        network: torch.nn.Module,
        card: Card,
        settings: Training,
        labels: Tensor,
        corrected: Tensor,
        device: torch.device,
    ) -> None:
        """`labels` float32 (N, C); `corrected` bool (N, C), the entries that stay as they are."""
        self.network = network.to(device)
        self.card, self.settings, self.device = card, settings, device
        self.optimizer = _optimizer(settings, network)
        self.latents = alignment.to_latent(labels)
        self.corrected = corrected
        self.unknown = corrected & (labels == UNKNOWN)
        self.loss = alignment.LOSSES[settings.loss]
        self.dtype = DTYPES[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.logits = torch.full_like(self.latents, torch.nan)
        self.step = 0

    def _forward(self, images: Tensor) -> Tensor:
        images = self.card.normalize(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.network(images).float()

    def train_epoch(self, data: Iterator[tuple[Tensor, Tensor]], steps: int, label: str) -> float:
        """One pass over the images with the labels fixed; the mean loss of an image.

        `steps` are those of the whole training. Keeps each image's logits for the label step.
        """
        self.network.train()
        targets = alignment.to_label(self.latents)
        self.logits.fill_(torch.nan)
        total, count = torch.zeros((), device=self.device), 0
        with Progress(label, len(targets), "images") as progress:
            for index, images in data:
                for group in self.optimizer.param_groups:
                    group["lr"] = _learning_rate(self.settings, self.step, steps)
                if len(index) == 1:  # batch norm needs two
                    images = images.repeat(2, 1, 1, 1)
                logits = self._forward(images)[: len(index)]
                wanted = targets[index].to(self.device, non_blocking=True)
                loss = self.loss(*self._without_unknown(index, logits, wanted))
                self.optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss.mean()).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.logits[index] = logits.detach().cpu()
                total += loss.detach().sum()
                count += len(index)
                self.step += 1
                progress.update(len(index))
        return float(total) / max(count, 1)

    def _without_unknown(
        self, index: Tensor, logits: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where a person could not decide, there is nothing to learn: no gradient, no loss."""
        unknown = self.unknown[index].to(self.device)
        held = logits.detach()
        return (
            torch.where(unknown, held, logits),
            torch.where(unknown, torch.sigmoid(held), targets),
        )

    def align_labels(self) -> float:
        """The network fixed, move every label that it saw but corrected ones.

        Returns the mean absolute move of a label.
        """
        seen = self.logits.isfinite().all(dim=1)
        before = alignment.to_label(self.latents[seen])
        moved = alignment.label_step(
            self.latents[seen],
            self.logits[seen],
            self.loss,
            sigma=self.settings.alignment.sigma,
            step_size=self.settings.alignment.step_size,
        )
        self.latents[seen] = torch.where(self.corrected[seen], self.latents[seen], moved)
        return float((alignment.to_label(self.latents[seen]) - before).abs().mean())

    @torch.inference_mode()
    def predict(self, data: Iterator[tuple[Tensor, Tensor]], images: int) -> Tensor:
        """Probabilities float32 (images, C) on the CPU; 0 for an image that is unusable."""
        self.network.eval()
        scores = torch.zeros(images, self.latents.shape[1])
        for index, pixels in data:
            scores[index] = torch.sigmoid(self._forward(pixels)).cpu()
        return scores

    def is_finite(self) -> bool:
        """Whether the network's weights and statistics are."""
        return all(bool(t.isfinite().all()) for t in self.network.state_dict().values())

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on. Random numbers are seeded anew each epoch."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "latents": self.latents,
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.latents = state["latents"]
        self.step = state["step"]


def _identity(settings: Training, labels: Path, max_pixels: int) -> str:
    """Digest of all that a training depends on, its images aside."""
    weights = Path(settings.weights or "")
    parts = [
        settings.model_dump_json(),
        digest(labels),
        digest(weights) if weights.is_file() else "",
        str(max_pixels),
        source_digest(__name__),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint, if it is one of this very training."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        note(f"train: {path} cannot be read ({first_line(error)}); starting over")
        return None
    if not isinstance(state, dict) or state.get("identity") != identity:
        note("train: the checkpoint is of other settings or labels; starting over")
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
    """
    target, workers = set_up(device, threads, workers, cpu_workers=1)
    table, classes, scores = read_scores(labels)
    if len(classes) == 1 and settings.loss == "kl_classes":
        raise UserError("training: a softmax over one class learns nothing; use the loss 'kl'")
    identity = _identity(settings, labels, max_pixels)
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
        provenance={
            "training": settings.model_dump(by_alias=True),
            "labels": {"digest": digest(labels), **read_facts(labels)},
            "software": versions(*SOFTWARE),
        },
    )
    corrected = torch.from_numpy(corrected_entries(table, classes))
    trainer = Trainer(network, card, settings, torch.from_numpy(scores), corrected, target)
    history: list[dict[str, Any]] = []
    if state := _load_checkpoint(checkpoint, identity):
        trainer.restore(state)
        history = json.loads(state["history"])
        note(f"train: going on after epoch {len(history)} of {settings.epochs}")

    train_images = TrainImages(table["path"].combine_chunks(), card, settings, max_pixels)
    loader = Loader(train_images, workers, target)
    measure_labels = Measure.of(images, table["image_id"].to_pylist(), classes, difficult)
    test = _test_set(images, classes, card, settings, difficult, max_pixels, workers, target)
    steps = settings.epochs * len(batches(np.arange(len(table)), settings.batch_size))
    parameters = sum(p.numel() for p in network.parameters())
    note(
        f"train: {settings.model} ({parameters / 1e6:.1f} M parameters) on {target}, "
        f"{len(table)} images, {len(classes)} classes, {settings.epochs} epochs"
    )
    for epoch in range(len(history), settings.epochs):
        torch.manual_seed(settings.seed * 1_000_003 + epoch)
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(table))
        plan = batches(order, settings.batch_size)
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
        row = {
            "epoch": epoch + 1,
            "loss": loss,
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "label_movement": 0.0,
            "train_mAP": measure_labels(torch.sigmoid(trainer.logits)),
            "images_per_second": len(table) / seconds,
        }
        after_warmup = epoch + 1 - settings.alignment.warmup
        due = after_warmup > 0 and (after_warmup - 1) % settings.alignment.every == 0
        if settings.alignment.enabled and due:
            row["label_movement"] = trainer.align_labels()
        row["label_mAP"] = measure_labels(alignment.to_label(trainer.latents))
        row["test_mAP"] = test(trainer) if test else None
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
        if epoch + 1 < settings.epochs:
            with replacing(checkpoint) as part:
                state = {"identity": identity, "history": json.dumps(history), **trainer.state()}
                torch.save(state, part)
    _write_results(output, trainer, table, history)
    checkpoint.unlink(missing_ok=True)


def _test_set(
    images: Path,
    classes: list[str],
    card: Card,
    settings: Training,
    difficult: Difficult,
    max_pixels: int,
    workers: int,
    device: torch.device,
) -> Any:
    """A function from a trainer to its mAP on the test split; None where nothing is known."""
    try:
        table = read_split(images, "test", ["image_id", "path"])
    except UserError:
        return None
    measure = Measure.of(images, table["image_id"].to_pylist(), classes, difficult)
    if not len(measure.places):
        return None
    data = TrainImages(table["path"].combine_chunks(), card, settings, max_pixels)
    loader = Loader(data, workers, device)
    plan = batches(np.arange(len(table)), max(settings.batch_size, 32))
    return lambda trainer: measure(trainer.predict(loader.epoch(-1, plan), len(table)))


def _write_results(
    output: Path, trainer: Trainer, table: pa.Table, history: list[dict[str, Any]]
) -> None:
    card = trainer.card
    refined = alignment.to_label(trainer.latents).numpy()
    facts = {"classes": card.classes, **card.provenance}
    save_classifier(trainer.network, card, output / "model")
    scores = score_table(table["image_id"], table["path"], card.classes, refined)
    if COLUMN in table.column_names:
        scores = scores.append_column(COLUMN, table[COLUMN])
    write_table(describe(scores, "scores", **facts), output / "refined_labels.parquet")
    types = {"epoch": pa.int32()}
    columns = {n: pa.array([r[n] for r in history], types.get(n, pa.float64())) for n in history[0]}
    write_table(describe(pa.table(columns), "history", **facts), output / "history.parquet")
