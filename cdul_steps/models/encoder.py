"""CLIP from open_clip: embeds images and prompts."""

import difflib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.utils import to_2tuple
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize

from cdul_steps.errors import UserError, first_line
from cdul_steps.models.device import DTYPES
from cdul_steps.models.recipe import Recipe, config_file, model_for_file
from cdul_steps.models.weights import cached_files, why_not_loaded

VOCABULARIES = (
    "tokenizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
TEXT_FILES = ("config.json", "tokenizer_config.json", *VOCABULARIES)
"""Files of a Hugging Face text tower or tokenizer; a tokenizer has at least one vocabulary."""


class MissingWeightsError(UserError):
    """Weights that are not in the cache; `instead` is what to do offline."""

    def __init__(self, missing: str, instead: str, reason: str) -> None:
        super().__init__(
            f"{missing} and cannot be fetched ({reason}); run once with network, or {instead}"
        )
        self.missing, self.instead = missing, instead


def load_clip(
    model: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    resize_mode: str | None = None,
    device: torch.device | str = "cpu",
) -> torch.nn.Module:
    """Load an open_clip model with its weights, in evaluation mode.

    `model` is a model name, with a tag or a checkpoint file as `pretrained`, or `local-dir:FOLDER`.
    Raises UserError if a file is missing, cannot be downloaded, or does not fit the model.
    """
    place = model.partition(":")[0]
    if place not in ("local-dir", "hf-hub"):
        _check_name(model, pretrained)
    elif pretrained:
        raise UserError(f"encoder {model}: a {place} has its own weights; remove 'pretrained'")
    if place == "local-dir" and config_file(model).is_file():
        config = config_file(model)
        if b"trust_remote_code" in config.read_bytes():
            raise UserError(
                f"encoder {model}: {config} requests to run its own code, which is not allowed"
            )
    is_tag = open_clip.is_pretrained_cfg(model, pretrained or "")
    preprocess = {"resize_mode": resize_mode} if resize_mode else {}
    quick_gelu = False
    if pretrained:
        # open_clip only warns about a tag's activation, and does not know that of a file.
        recipe = Recipe.of_tag(model, pretrained) if is_tag else Recipe.of_file(model)
        preprocess, quick_gelu = {**recipe.preprocess, **preprocess}, recipe.quick_gelu
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            network = open_clip.create_model(
                model,
                pretrained,
                precision=precision,
                device=device,
                require_pretrained=True,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg=preprocess,
            )
    except Exception as error:
        raise _not_loaded(model, pretrained, error) from error
    return network.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which also logs its exceptions to the root logger."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _check_name(model: str, pretrained: str | None) -> None:
    if model not in open_clip.list_models():
        if Path(model).is_dir():
            raise UserError(f"encoder {model}: for a folder with weights write 'local-dir:{model}'")
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        raise UserError(
            f"encoder {model}: open_clip has no such model"
            + (f"; similar: {', '.join(near)}" if near else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise UserError(
            f"encoder {model}: 'pretrained' is missing; a checkpoint file or one of "
            f"{', '.join(tags) or 'no known tags'}"
        )
    if open_clip.is_pretrained_cfg(model, pretrained):
        return
    if Path(pretrained).is_dir():
        raise UserError(
            f"encoder {model}: pretrained {pretrained!r} is a folder; give 'model: "
            f"local-dir:{pretrained}' without 'pretrained', or a file in that folder"
        )
    if not Path(pretrained).is_file():
        raise UserError(
            f"encoder {model}: pretrained {pretrained!r} is neither a file nor one of open_clip's "
            f"tags ({', '.join(tags)})"
        )


def _not_loaded(model: str, pretrained: str | None, error: Exception) -> UserError:
    """The error to raise if open_clip cannot create the network."""
    tag = open_clip.get_pretrained_cfg(model, pretrained or "")
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    if tag and "Failed to download" in str(error):
        file = f"{repository}/{name or HF_SAFE_WEIGHTS_NAME}"
        by_file = model_for_file(model, Recipe.of_tag(model, pretrained or ""))
        file_or = "" if by_file == model else f" (of the model {by_file})"
        file_or = f"the file as 'pretrained'{file_or} or " if by_file else ""
        return MissingWeightsError(
            f"encoder {model}: {file} is not in the cache ({hub.HF_HUB_CACHE})",
            f"copy that cache here, or give {file_or}its folder as 'model: local-dir:FOLDER' "
            "without 'pretrained'",
            first_line(error),
        )
    if lacks := _text_lacks(model, "hf_model_name"):
        return UserError(f"encoder {model}: its text tower {lacks}")
    place, _, path = model.partition(":")
    if place == "local-dir":
        suffixes = (".safetensors", ".bin", ".pth")
        files = sorted(f for f in Path(path).glob("*.*") if f.suffix in suffixes)
    elif tag or place == "hf-hub":
        names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        names = [name.replace(".bin", ".safetensors"), name] if name else names
        files = cached_files(repository or path, names)
    else:
        files = [Path(pretrained or "")]
    why = why_not_loaded(error, files, cached=bool(tag) or place == "hf-hub")
    return UserError(f"encoder {model}: {pretrained or path} cannot be loaded: {why}")


def _text_lacks(model: str, key: Literal["hf_model_name", "hf_tokenizer_name"]) -> str | None:
    """What a Hugging Face text tower or tokenizer needs that is missing.

    None if the model's `text_cfg` names none under `key`, or if nothing is missing.
    """
    try:
        name = open_clip.get_model_config(model)["text_cfg"].get(key)
    except Exception:
        # If the config cannot be read, the original error is more informative.
        return None
    if not name:
        return None
    if importlib.util.find_spec("transformers") is None:
        return "needs the package transformers: pip install transformers"
    folder = model.removeprefix("local-dir:")
    if key == "hf_tokenizer_name" and folder != model:
        where = f"in {folder}; copy them from the repository {name}"
        here = {path.name for path in Path(folder).iterdir()}
    else:
        where = (
            f"of the repository {name}, not in the cache ({hub.HF_HUB_CACHE}); run once with "
            "network, or copy that cache here"
        )
        here = {path.name for path in cached_files(name, TEXT_FILES)}
    if key == "hf_model_name":
        lacking = {"config.json"} - here
    else:
        lacking = {"tokenizer_config.json"} - here
        lacking |= set() if here & set(VOCABULARIES) else {"tokenizer.json"}
    return f"needs {' and '.join(sorted(lacking))} {where}" if lacking else None


@dataclass(frozen=True)
class Preprocess:
    """The model's own preprocessing, split into its uint8 and its float part."""

    resize: Compose
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, network: torch.nn.Module, *, scale: int = 1) -> "Preprocess":
        """Read the preprocessing of an open_clip model.

        With another `scale`, the whole image is squashed to an input larger by this factor.
        """
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))
        if scale != 1:
            height, width = to_2tuple(config.size)
            config.size, config.resize_mode = (height * scale, width * scale), "squash"
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
        """The float part, on the views' device: uint8 (B, 3, H, W) to `dtype`, same shape."""
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
        """Embed uint8 views (B, 3, H, W): float32 vectors (B, ..., D), not normalised."""
        views = self.preprocess.normalize(views.to(self.device, non_blocking=True), self.dtype)
        views = views.contiguous(memory_format=torch.channels_last)
        return self.network.encode_image(views).float().cpu().numpy()


class TextEncoder:
    """The text tower, with the tokenizer of its model.

    Raises UserError if the tokenizer needs a package or files that are missing.
    """

    def __init__(self, network: torch.nn.Module, model: str) -> None:
        self.network, self.model = network, model
        with self._told():
            self.tokenize: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(model)

    @torch.inference_mode()
    def __call__(self, prompts: list[str]) -> np.ndarray:
        """Embed prompts: float32 vectors (P, D), not normalised."""
        with self._told():
            tokens = self.tokenize(prompts)
        return self.network.encode_text(tokens).float().cpu().numpy()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except Exception as error:
            lacks = _text_lacks(self.model, "hf_tokenizer_name")
            why = lacks or f"cannot be used: {' '.join(str(error).split())[:400]}"
            raise UserError(f"encoder {self.model}: its tokenizer {why}") from error


def logit_scale(network: torch.nn.Module) -> float:
    """The factor on the cosines, `exp` of the model's parameter: 100 for OpenAI's CLIP."""
    return float(network.logit_scale.float().exp())


def logit_facts(network: torch.nn.Module) -> dict[str, float]:
    """`logit_scale`, and `logit_bias` of a model that was trained with a sigmoid: they turn cosines
    into logits."""
    bias = network.logit_bias
    further = {} if bias is None else {"logit_bias": float(bias.float())}
    return {"logit_scale": logit_scale(network), **further}
