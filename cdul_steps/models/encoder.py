"""CLIP by open_clip: images and prompts to unit vectors."""

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.utils import to_2tuple
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize

from cdul_steps.errors import UserError, first_line
from cdul_steps.models.device import DTYPES


def load_clip(
    model: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    resize_mode: str | None = None,
    device: torch.device | str = "cpu",
) -> torch.nn.Module:
    """Load an open_clip model with its weights, in evaluation mode.

    `model` is a model name with `pretrained` a tag or a checkpoint file, or `local-dir:FOLDER`.
    Raises UserError where a file is missing, cannot be fetched, or does not fit the model.
    """
    place = model.partition(":")[0]
    if place not in ("local-dir", "hf-hub"):
        _check_name(model, pretrained)
    elif pretrained:
        raise UserError(f"encoder {model}: a {place} holds its own weights; drop 'pretrained'")
    config = Path(model.removeprefix("local-dir:"), "open_clip_config.json")
    if place == "local-dir" and config.is_file() and b"trust_remote_code" in config.read_bytes():
        raise UserError(f"encoder {model}: {config} asks to run code of its own; it may not")
    # open_clip only warns when OpenAI's weights meet a model without their activation.
    tag = open_clip.get_pretrained_cfg(model, pretrained or "")
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            network = open_clip.create_model(
                model,
                pretrained,
                precision=precision,
                device=device,
                require_pretrained=True,
                force_quick_gelu=bool(tag and tag.get("quick_gelu")),
                force_preprocess_cfg={"resize_mode": resize_mode} if resize_mode else None,
            )
    except Exception as error:
        raise UserError(_why_not_loaded(model, pretrained, tag, error)) from error
    return network.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs what it raises to the root logger as well."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _check_name(model: str, pretrained: str | None) -> None:
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        raise UserError(
            f"encoder {model}: open_clip has no such model"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise UserError(
            f"encoder {model}: 'pretrained' is missing; a checkpoint file or one of "
            f"{', '.join(tags) or 'no known tags'}"
        )
    if not open_clip.is_pretrained_cfg(model, pretrained) and not Path(pretrained).is_file():
        raise UserError(
            f"encoder {model}: pretrained {pretrained!r} is neither a file nor one of open_clip's "
            f"tags ({', '.join(tags)})"
        )


def _why_not_loaded(
    model: str, pretrained: str | None, tag: dict[str, Any], error: Exception
) -> str:
    if tag and "Failed to download" in str(error):
        file = tag.get("hf_hub") or tag.get("url", "")
        missing = f"{file}open_clip_model.safetensors" if file.endswith("/") else file
        # A file does not say that it needs OpenAI's activation; the name of the model can.
        quick = tag.get("quick_gelu") and not model.endswith("-quickgelu")
        name = f" (of the model {model}-quickgelu)" if quick else ""
        return (
            f"encoder {model}: {missing} is not in the cache ({hub.HF_HUB_CACHE}) and cannot be "
            f"fetched; run once with network, copy that cache here, or give the file as "
            f"'pretrained'{name} or its folder as 'local-dir:FOLDER' ({first_line(error)})"
        )
    place = pretrained or model.removeprefix("local-dir:")
    return f"encoder {model}: {place} cannot be loaded: {first_line(error)}"


@dataclass(frozen=True)
class Preprocess:
    """The model's own preprocessing, cut in two where pixels stop being uint8."""

    resize: Compose
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, network: torch.nn.Module) -> "Preprocess":
        """Read the preprocessing that belongs to an open_clip model."""
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))
        transform = image_transform_v2(config, is_train=False)
        *resize, to_tensor, normalize = transform.transforms
        assert isinstance(normalize, Normalize) and "ToTensor" in type(to_tensor).__name__
        return cls(
            Compose(resize), to_2tuple(config.size), tuple(normalize.mean), tuple(normalize.std)
        )

    def views(self, image: Image.Image, boxes: np.ndarray) -> np.ndarray:
        """Crop `boxes` int (V, 4), pixels x0 y0 x1 y1, and resize them: uint8 (V, 3, H, W)."""
        views = np.empty((len(boxes), 3, *self.size), np.uint8)
        for view, box in zip(views, boxes.tolist(), strict=True):
            view[:] = np.asarray(self.resize(image.crop(box))).transpose(2, 0, 1)
        return views

    def normalize(self, views: Tensor, dtype: torch.dtype) -> Tensor:
        """The rest, on the views' device: uint8 (B, 3, H, W) to `dtype`, same shape."""
        mean = torch.tensor(self.mean, device=views.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=views.device).view(3, 1, 1)
        return ((views.float() / 255 - mean) / std).to(dtype)


class ImageEncoder:
    """The image tower."""

    def __init__(self, network: torch.nn.Module, precision: str, device: torch.device) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.preprocess = Preprocess.of(network)
        self.dtype, self.device = DTYPES[precision], device

    @torch.inference_mode()
    def __call__(self, views: Tensor) -> np.ndarray:
        """Embed uint8 views (B, 3, H, W): float32 vectors (B, D), as the tower gives them."""
        views = self.preprocess.normalize(views.to(self.device, non_blocking=True), self.dtype)
        views = views.contiguous(memory_format=torch.channels_last)
        return self.network.encode_image(views).float().cpu().numpy()


@torch.inference_mode()
def embed_prompts(network: torch.nn.Module, model: str, prompts: list[str]) -> np.ndarray:
    """Embed prompts with the text tower: float32 (P, D), as the tower gives them."""
    try:
        with _quiet():
            tokens = open_clip.get_tokenizer(model)(prompts)
    except Exception as error:
        raise UserError(
            f"encoder {model}: its tokenizer cannot be used: {first_line(error)}"
        ) from error
    return network.encode_text(tokens).float().cpu().numpy()


def logit_scale(network: torch.nn.Module) -> float:
    """The factor on the cosines, `exp` of the model's parameter: 100 for OpenAI's CLIP."""
    return float(network.logit_scale.float().exp())
