"""Stage features: the features of each image from a frozen trunk, once for all its trainings."""

from pathlib import Path

import numpy as np
import torch

from cdul_steps.config import Network
from cdul_steps.data.files import digest
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.outcomes import outcome_table
from cdul_steps.data.stores import check_store, shard_file, write_metadata, write_shard
from cdul_steps.data.tables import describe, read_facts, require, write_table
from cdul_steps.models.classifier import Card, network_and_card
from cdul_steps.models.device import InBatches, Machine
from cdul_steps.models.embedding import encode_shard_images
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.timm_encoder import TOGETHER, TimmEncoder, pooled_features
from cdul_steps.progress import note
from cdul_steps.provenance import versions

SOFTWARE = ("torch", "onnxruntime", "timm", "zarr", "pillow")


def write_feature_store(*, images: Path, split: str, settings: Network, store: Path) -> None:
    """Write the `zarr.json` of a split's features: float32 (N, 1, D).

    The `make_features` jobs write the shards.
    """
    facts = require(images, read_facts(images), "layout", "rows")
    encoder, _ = _load(settings, torch.device("cpu"))
    size = encoder.preprocess.size
    dimension = encoder(torch.zeros((1, 3, *size), dtype=torch.uint8)).shape[1]
    shape = (facts["rows"][split], 1, dimension)
    write_metadata(store, shape, facts["layout"]["shard_size"], "float32", {"kind": "features"})


def make_features(
    *,
    manifest: Path,
    store: Path,
    table: Path,
    settings: Network,
    max_pixels: int,
    machine: Machine,
) -> None:
    """Compute the features of one shard's images.

    A feature vector is the input of the network's last layer: the pooled output of all layers
    below it, for the whole image squashed to the input size. Writes the shard's object of `store`,
    float32 (shard_size, 1, D) with NaN for images that cannot be used, and finally `table`, one row
    per image: `image_id, row, status, error, seconds`. Raises UserError if the network cannot be
    created, or its trunk cannot be frozen.
    """
    check_store(store, "features")
    facts, images, boxes = read_shard(manifest)
    target, workers = machine.set_up(cpu_workers=0)
    encoder, card = _load(settings, target)
    work = len(images) / max(1, workers)
    choice = choose_engine(encoder, machine.engine, machine.batch_size, views=TOGETHER, work=work)
    encode = InBatches(choice.encoder, choice.batch_size, "features")
    note(
        f"features: {settings.model} at {settings.image_size} px on {target}; {len(images)} images "
        f"by {choice.engine}, {workers} workers"
    )
    rows, outcome, seconds = encode_shard_images(
        (facts, images, boxes[:, :1]),
        encode,
        encoder,
        np.float32,
        workers,
        max_pixels,
        TOGETHER,
    )
    write_shard(store, facts["shard"], rows, facts["shard_size"])
    failed = sum(status != "ok" for status, _, _ in outcome)
    described = describe(
        outcome_table(images, outcome),
        "features",
        shard=facts["shard"],
        network=settings.model_dump(),
        weights=_weights_digest(settings),
        mean=card.mean,
        std=card.std,
        interpolation=card.interpolation,
        device=str(target),
        engine=choice.engine,
        batch_size=encode.batch_size,
        seconds=round(seconds, 3),
        images_per_second=round(len(images) / seconds, 2),
        digest=digest(shard_file(store, facts["shard"])),
        software=versions(*SOFTWARE),
    )
    write_table(described, table)
    note(
        f"features: {len(images) - failed} images ok, {failed} failed, "
        f"{len(images) / seconds:.1f} images/s"
    )


def _load(settings: Network, device: torch.device) -> tuple[TimmEncoder, Card]:
    network, card = network_and_card(settings, ["none"])
    return TimmEncoder(network, card, device, pooled_features(network)), card


def _weights_digest(settings: Network) -> str | None:
    weights = Path(settings.weights or "")
    return digest(weights) if weights.is_file() else settings.weights
