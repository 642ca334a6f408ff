"""A small classifier, its card and its weights."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from cdul_steps.models.classifier import (
    Card,
)

MODEL = "test_byobnet"
CLASSES = ["cat", "dog", "bird"]
CPU = torch.device("cpu")


def backbone(path: Path, classes: int = 7, model: str = MODEL) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save_file(timm.create_model(model, num_classes=classes).state_dict(), path)
    return path


def card(**changes) -> Card:
    values = {
        "model": MODEL,
        "classes": CLASSES,
        "image_size": 40,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic",
        "threshold": 0.5,
    }
    return Card(**{**values, **changes})
