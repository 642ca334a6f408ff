"""Train the demo's tiny CLIP on generated pictures of single objects and their captions."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save

from cdul_steps.data.files import replacing, write_text
from cdul_steps.demo.scenes import CLASSES, single_objects
from cdul_steps.errors import UserError

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
SIZE = 64
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "timm_model_name": "test_byobnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    },
    # The tokenizer defines the vocabulary, so the width determines the size of the whole model.
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}
PREPROCESS_CFG = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "size": SIZE,
}

PROMPT = "a photo of a {}"
TEMPLATES = (
    PROMPT,
    "a photo of the {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a painting of one {}",
    "an image with a {}",
    "there is a {}",
    "a {}",
    "{}",
)
EMPTY_CAPTIONS = (
    "a photo of nothing",
    "a picture of an empty background",
    "a background",
    "nothing but colours",
)
# One picture of each class and an empty one: in such a group no caption fits two pictures.
GROUP = (*CLASSES, None)
GROUPS_PER_STEP = 5
BANK_GROUPS = 2000
TEST_GROUPS = 50


def draw_groups(count: int, *, seed: int) -> tuple[torch.Tensor, list[list[str | None]]]:
    """`single_objects` in the model's size as a (count, len(GROUP), 3, SIZE, SIZE) uint8 tensor."""
    pictures, colours = single_objects(count, size=SIZE, seed=seed)
    return torch.from_numpy(pictures).permute(0, 1, 4, 2, 3), colours


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Convert (..., 3, SIZE, SIZE) uint8 pictures to the model's (N, 3, SIZE, SIZE) float32."""
    mean, std = (torch.tensor(PREPROCESS_CFG[k]).view(3, 1, 1) for k in ("mean", "std"))
    batch = (pictures.flatten(0, -4).float() / 255 - mean) / std
    return batch.contiguous(memory_format=torch.channels_last)


def _caption(name: str | None, colour: str | None, rng: np.random.Generator) -> str:
    if name is None:
        return str(rng.choice(EMPTY_CAPTIONS))
    thing = f"{colour} {name}" if rng.random() < 0.4 else name
    return str(rng.choice(TEMPLATES)).format(thing)


@torch.inference_mode()
def zero_shot_accuracy(
    model: torch.nn.Module, tokenizer: open_clip.SimpleTokenizer, pictures: torch.Tensor
) -> float:
    """The share of `draw_groups` pictures, without empty ones, whose best class is correct."""
    model.eval()
    text = model.encode_text(tokenizer([PROMPT.format(name) for name in CLASSES]), normalize=True)
    right = []
    for group in pictures[:, : len(CLASSES)]:
        image = model.encode_image(normalise(group), normalize=True)
        right.append((image @ text.T).argmax(1) == torch.arange(len(CLASSES)))
    return torch.cat(right).float().mean().item()


def _batches(
    pictures: torch.Tensor,
    colours: list[list[str | None]],
    tokenizer: open_clip.SimpleTokenizer,
    rng: np.random.Generator,
    steps: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised pictures and caption tokens, in batches of GROUPS_PER_STEP whole groups."""
    for _ in range(steps):
        # Pictures of different groups are mixed; only the classes must keep their positions.
        picks = rng.integers(len(pictures), size=(GROUPS_PER_STEP, len(GROUP)))
        batch = pictures[torch.from_numpy(picks), torch.arange(len(GROUP))].flatten(0, 1)
        flip = torch.from_numpy(rng.random(len(batch)) < 0.5)
        batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(-1), batch)
        captions = [
            _caption(GROUP[j], colours[k][j], rng) for row in picks for j, k in enumerate(row)
        ]
        yield normalise(batch), tokenizer(captions)


def train_clip(output: Path, *, seed: int = 0, steps: int = 4000) -> None:
    """Train a tiny CLIP and write it to the folder `output` in open_clip's own format.

    The loss is CLIP's symmetric cross-entropy over captions and pictures, within groups of one
    picture per class: with so few classes, most "wrong" captions in a whole batch would be correct.
    The files are `open_clip_model.safetensors` (float16) and then `open_clip_config.json`;
    `open_clip.create_model_and_transforms("local-dir:<output>")` loads them. The same seed, steps
    and machine give the same bytes, so torch uses a single thread. Progress goes to stderr.

    Raises UserError for fewer than one step, and if `output` contains a model.
    """
    if steps < 1:
        raise UserError(f"cannot train a CLIP for {steps} steps: give 1 or more")
    for name in (WEIGHTS, CONFIG):
        if (output / name).exists():
            raise UserError(f"{output / name}: a model already exists; give a new folder")
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL_CFG).to(memory_format=torch.channels_last)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
    print("drawing single objects", file=sys.stderr)
    pictures, colours = draw_groups(min(BANK_GROUPS, steps * GROUPS_PER_STEP), seed=seed)

    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1
    )
    clip_loss = ClipLoss()
    model.train()
    mean_loss, reported = math.log(len(GROUP)), time.monotonic()
    for step, (images, tokens) in enumerate(_batches(pictures, colours, tokenizer, rng, steps), 1):
        image, text, scale = model(images, tokens)
        pairs = zip(image.split(len(GROUP)), text.split(len(GROUP)), strict=True)
        loss = torch.stack([clip_loss(i, t, scale) for i, t in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            print(f"step {step} of {steps}: loss {mean_loss:.3f}", file=sys.stderr, flush=True)

    test, _ = draw_groups(TEST_GROUPS, seed=seed + 1)
    accuracy = zero_shot_accuracy(model, tokenizer, test)
    print(
        f"trained {steps} steps: loss {mean_loss:.3f}, zero-shot top-1 {accuracy:.3f} on unseen "
        f"single objects, logit scale exp {model.logit_scale.exp().item():.1f}",
        file=sys.stderr,
    )
    output.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    with replacing(output / WEIGHTS) as part:
        part.write_bytes(save(weights))
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    write_text(output / CONFIG, json.dumps(config, indent=1) + "\n")
