"""Does a head on a frozen trunk gain from being consistent over photographs with other colours?

    python experiments/consistency.py --labels pseudo_labels.parquet --images images.parquet \\
        --features train=TRAIN.zarr --features test=TEST.zarr --altered ALTERED.zarr \\
        --settings settings.yaml

Trains the head on fixed labels or, with `--refined`, on labels halfway to refined ones, as a
training with `trunk: frozen` does, with and without the second loss of CCD (CVPR 2025): the binary
cross-entropy between the probabilities for the altered photograph and those for the photograph
itself, which are held fixed. Also trains on either photograph with the same labels. Prints the test
mAP in Markdown.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from cdul_steps.config import Training
from cdul_steps.data.manifest import read_split
from cdul_steps.data.tables import read_scores
from cdul_steps.data.truth import Truth
from cdul_steps.method.gradient_alignment import halfway, to_latent
from cdul_steps.training.features import Standardised, read_features
from cdul_steps.training.loader import batches
from cdul_steps.training.trainer import optimizer

WAYS = {
    "labels": (0.0, False),
    "consistency": (1.0, False),
    "consistency, three times": (3.0, False),
    "either photograph, with its labels": (0.0, True),
}
"""The weight of consistency, and whether a batch may consist of the altered photographs."""


def loss_of(head: torch.nn.Module, views: Tensor, target: Tensor, weight: float) -> Tensor:
    """The loss of a batch: views (B, 2, D) of the photograph and of the altered one."""
    logits = head(views[:, 0])
    loss = cross_entropy(logits, target, reduction="none").sum(dim=1).mean()
    if weight:
        held = logits.detach().sigmoid()
        loss = (
            loss + weight * cross_entropy(head(views[:, 1]), held, reduction="none").sum(1).mean()
        )
    return loss


def train(
    views: Tensor, target: Tensor, settings: Training, weight: float, both: bool
) -> torch.nn.Module:
    """A head (D to C) trained on views (N, 2, D) with labels (N, C)."""
    torch.manual_seed(settings.seed)
    head = torch.nn.Linear(views.shape[2], target.shape[1], bias=False)
    torch.nn.init.zeros_(head.weight)
    steps = optimizer(settings, [{"params": [head.weight]}])
    total = settings.epochs * len(batches(np.arange(len(views)), settings.batch_size))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(steps, total)
    for epoch in range(settings.epochs):
        random = np.random.default_rng((settings.seed, epoch))
        for batch in batches(random.permutation(len(views)), settings.batch_size):
            index = torch.tensor(batch)
            seen = views[index]
            if both and random.random() < 0.5:
                seen = seen.flip(1)
            steps.zero_grad()
            loss_of(head, seen, target[index], weight).backward()
            steps.step()
            cosine.step()
    return head


def main() -> None:
    """Read, train each way with each seed, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--labels", type=Path, required=True, help="pseudo_labels.parquet")
    parser.add_argument("--refined", type=Path, help="refined_labels.parquet of a training on them")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--features", action="append", required=True, help="SPLIT=STORE, each once")
    parser.add_argument("--altered", type=Path, required=True, help="train features of the altered")
    parser.add_argument("--settings", type=Path, required=True, help="YAML of trainings.NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    stores = {name: Path(store) for name, store in (s.split("=", 1) for s in options.features)}
    settings = Training.model_validate(yaml.safe_load(options.settings.read_text()))
    table, classes, labels = read_scores(options.labels)
    split = {name: read_split(options.images, name, ["image_id", "row"]) for name in stores}
    rows = {name: of["row"].to_numpy() for name, of in split.items()}
    train_ids, test_ids = (split[name]["image_id"].to_pylist() for name in ("train", "test"))
    if table["image_id"].to_pylist() != train_ids:
        parser.error(f"{options.labels}: not all of the train images have labels")
    truth = Truth.of(options.images, test_ids, classes, "ignore")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        both = 2 if settings.model_args.get("global_pool") == "catavgmax" else 1
        features = read_features(stores["train"], rows["train"], scratch)
        altered = read_features(options.altered, rows["train"], scratch)
        # Each with its own mean: a head without a bias would learn the shift of the mean instead.
        own, others = Standardised(features, both), Standardised(altered, both)
        views = torch.stack([own(features, scratch), others(altered, scratch)], dim=1)
        test = own(read_features(stores["test"], rows["test"], scratch), scratch)
        latents = to_latent(torch.from_numpy(labels))
        if options.refined:
            refined = torch.from_numpy(read_scores(options.refined)[2])
            latents = halfway(latents, to_latent(refined))
        target = latents.sigmoid()
        print("| way | test mAP |\n|---|---|")
        for way, (weight, swap) in WAYS.items():
            found = []
            for seed in options.seeds:
                changed = settings.model_copy(update={"seed": seed})
                head = train(views, target, changed, weight, swap)
                with torch.no_grad():
                    logits = head(test)
                found.append(truth.mean_average_precision(logits.numpy()) or 0.0)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"| {way} | {statistics.mean(found):.2f} ± {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
