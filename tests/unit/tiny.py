"""Tiny models and images for the encoder and classifier tests."""

import json
import math
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from cdul_steps.config import Dataset
from cdul_steps.models.device import Machine
from cdul_steps.steps.manifest import make_manifest

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_scale": math.log(10),
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        **CLIP["text_cfg"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
    },
}
"""Like open_clip's ViT-B-16-SigLIP, except for the size and the tokenizer."""
PREPROCESS = {"mean": [0.5, 0.45, 0.4], "std": [0.25, 0.26, 0.27], "resize_mode": "squash"}
WEIGHTS = "open_clip_model.safetensors"
MAX_PIXELS = 100_000
MACHINE = Machine("cpu", workers=0, threads=1)


def on(arguments: dict) -> dict:
    """Arguments of a stage, with those of `Machine` merged into one; MACHINE has the defaults."""
    own = {f.name: arguments[f.name] for f in fields(MACHINE) if f.name in arguments}
    others = {name: value for name, value in arguments.items() if name not in own}
    return {**others, "machine": replace(MACHINE, **own)}


def make_clip(folder: Path, change=lambda network: None, **model: object) -> str:
    """Write a random CLIP as an open_clip folder; returns its name for `load_clip`."""
    model = {**deepcopy(CLIP), **model}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.model.CLIP(**deepcopy(model))
    # In a new network, the weight of the pixels is so small that all images look the same.
    if hasattr(network.visual, "conv1"):
        network.visual.conv1.weight.data.mul_(10)
    return _write_clip(folder, network, change, model)


def make_siglip(folder: Path, change=lambda network: None, **text: object) -> str:
    """Write a random SigLIP as an open_clip folder; returns its name for `load_clip`.

    `text` changes its text tower.
    """
    model = deepcopy(SIGLIP)
    model["text_cfg"].update(text)
    towers = {name: value for name, value in deepcopy(model).items() if name != "custom_text"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.model.CustomTextCLIP(**towers)
    network.visual.trunk.patch_embed.proj.weight.data.mul_(10)
    return _write_clip(folder, network, change, model)


def _write_clip(folder: Path, network: torch.nn.Module, change, model: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    change(network)
    config = {"model_cfg": model, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / WEIGHTS)
    return f"local-dir:{folder}"


def noise(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Write an image of coarse noise that differs for every seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def folder_manifest(root: Path, output: Path, shard_size: int = 5, grid=(2, 2)) -> Path:
    """Make the manifest of a folder of images; returns the folder of its shards."""
    classes = output / "classes.txt"
    classes.parent.mkdir(parents=True, exist_ok=True)
    classes.write_text("cat\ndog\nbird\n")
    dataset = Dataset(
        reader="folder",
        root=root,
        classes=classes,
        splits={"train": "."},
        grid=grid,
        shard_size=shard_size,
        max_pixels=MAX_PIXELS,
        max_failed_share=1,
    )
    make_manifest(dataset=dataset, output=output / "images.parquet")
    return output / "train"
