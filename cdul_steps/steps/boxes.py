"""Stage boxes: second views, each around a region that a trained classifier takes for a class."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cdul_steps.config import BoxShape
from cdul_steps.data.files import digest
from cdul_steps.data.manifest import (
    IMAGE_COLUMNS,
    IMAGES_KIND,
    SHARD_KIND,
    read_shard,
    shard_table,
)
from cdul_steps.data.tables import describe, read_facts, read_table, require, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.boxes import map_boxes, to_pixels
from cdul_steps.models.cam import activation_maps, map_shape
from cdul_steps.models.classifier import WEIGHTS, load_classifier
from cdul_steps.models.device import InBatches, Machine
from cdul_steps.models.embedding import encode_shard_images
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.timm_encoder import TOGETHER, TimmEncoder
from cdul_steps.progress import note


def write_box_images(*, images: Path, class_count: int, output: Path) -> None:
    """Write the `images.parquet` of second views: the data set's train split, row for row.

    Its layout states that an image's views are the whole image and `class_count` boxes, or one box
    per class if there are fewer.
    """
    facts = require(images, read_facts(images), "layout", "rows", "classes")
    table = pq.read_table(images)
    table = table.filter(pc.equal(table["split"], "train"))
    layout = facts["layout"] | {
        "reader": "boxes",
        "splits": {"train": facts["layout"]["splits"]["train"]},
        "grid": [],
        "overlap": 0.0,
        "views": 1 + min(class_count, len(facts["classes"])),
    }
    facts |= {"layout": layout, "rows": {"train": facts["rows"]["train"]}}
    write_table(describe(table, IMAGES_KIND, **_own(facts)), output)


def make_boxes(
    *,
    manifest: Path,
    model: Path,
    settings: BoxShape,
    max_pixels: int,
    machine: Machine,
    output: Path,
) -> None:
    """Write the second views of one shard: a manifest like the shard's own, `manifest`.

    Each image gets one box for each of its `settings.classes` most probable classes, or for all
    classes if there are fewer: around the strong cells of the class's activation map
    (`method.boxes.map_boxes`). The column `class` names the class; it is null for view 0, the whole
    image. An image that cannot be read gets empty boxes, also for view 0, so that encode records it
    as failed. Raises UserError for a model that cannot be loaded or has no map of features.
    """
    target, workers = machine.set_up(cpu_workers=0)
    facts, images, boxes = read_shard(manifest)
    network, card = load_classifier(model, target)
    blank = torch.zeros((1, 3, card.image_size, card.image_size), device=target)
    shape = map_shape(network, blank)
    if shape is None:
        raise UserError(
            f"{model}: {card.model} has no feature map, so it cannot locate a class; boxes need a "
            "convolutional network"
        )
    count = min(settings.classes, len(card.classes))
    trunk = TimmEncoder(
        network, card, target, lambda images: network.forward_features(images).flatten(1)
    )
    work = len(images) / max(1, workers)
    choice = choose_engine(trunk, machine.engine, machine.batch_size, views=TOGETHER, work=work)
    in_batches = InBatches(choice.encoder, choice.batch_size, "boxes")
    find = partial(_find, network, in_batches, shape, settings, count)
    encode = InBatches(find, max(choice.batch_size, TOGETHER), "boxes")
    found, outcome, seconds = encode_shard_images(
        (facts, images, boxes[:, :1]),
        encode,
        trunk,
        np.float32,
        workers,
        max_pixels,
        TOGETHER,
    )
    places = images["row"].to_numpy() - facts["shard"] * facts["shard_size"]
    of_images = found[places, 0].reshape(len(images), count, 5)
    views = np.repeat(boxes[:, :1], 1 + count, axis=1)
    named: list[str | None] = []
    for view, of_image in zip(views, of_images, strict=True):
        named.append(None)
        if np.isfinite(of_image).all():
            view[1:] = to_pixels(of_image[:, 1:], *view[0, 2:])
            named += [card.classes[int(c)] for c in of_image[:, 0]]
        else:
            view[:] = 0
            named += [None] * count
    table = read_table(manifest, [*IMAGE_COLUMNS, "view"])
    rows = table.filter(pc.equal(table["view"], 0)).drop_columns("view").to_pylist()
    result = shard_table(rows, views).append_column("class", pa.array(named, pa.string()))
    facts = facts | {"views": 1 + count, "grid": [], "overlap": 0.0}
    described = describe(
        result,
        SHARD_KIND,
        **_own(facts),
        boxes=settings.model_dump(),
        model=card.model,
        weights=digest(model / WEIGHTS),
    )
    write_table(described, output)
    failed = sum(status != "ok" for status, _, _ in outcome)
    note(
        f"boxes: {len(images) - failed} images ok, {failed} failed, "
        f"{len(images) / seconds:.1f} images/s"
    )


def _find(
    network: torch.nn.Module,
    trunk: InBatches,
    shape: torch.Size,
    settings: BoxShape,
    count: int,
    images: Tensor,
) -> np.ndarray:
    """The boxes of the best `count` classes of uint8 images (B, 3, H, W): float32 (B, count * 5).

    Each box is the index of its class and `x0, y0, x1, y1` as shares of the image. `trunk` maps
    the images to the network's maps of features, each of `shape`.
    """
    # Maps need gradients, which inference mode does not compute.
    with torch.inference_mode(mode=False), torch.no_grad():
        vectors = torch.from_numpy(trunk(images.numpy())).to(next(network.parameters()).device)
        features = vectors.view(-1, *shape)
        best = network.forward_head(features).topk(count, dim=1).indices
        maps = activation_maps(network, features, best)
        boxes = map_boxes(maps, settings.threshold, settings.margin)
    return torch.cat([best[:, :, None].float(), boxes], dim=2).flatten(1).cpu().numpy()


def _own(facts: dict) -> dict:
    """A table's own facts, without those that `describe` writes."""
    return {k: v for k, v in facts.items() if k not in ("kind", "schema_version")}
