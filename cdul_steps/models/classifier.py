"""The classifier: a timm network, and the folder of a trained one."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor

from cdul_steps.config import Network
from cdul_steps.data.files import SCHEMA_VERSION, check_version, replacing, write_text
from cdul_steps.errors import UserError, first_line
from cdul_steps.models.weights import cached_files, why_not_loaded

WEIGHTS = "model.safetensors"
CARD = "model.json"
# Arguments of timm.create_model that download or read files outside the model folder.
ELSEWHERE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=1),
}


@dataclass(frozen=True)
class Card:
    """Everything needed to use a trained classifier, apart from its weights.

    `thresholds` has the classes with their own threshold; `checked` has the quality at these
    thresholds, estimated from a person's answers. `cdul check thresholds` writes both.
    """

    model: str
    classes: Annotated[list[str], Field(min_length=1)]
    image_size: Annotated[int, Field(ge=1)]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    interpolation: Literal["bilinear", "bicubic"]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    model_args: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def resize(
        self, image: Image.Image, box: tuple[float, float, float, float] | None = None
    ) -> np.ndarray:
        """Squash an RGB image, or a `box` in it, to the input size: uint8 (3, H, W)."""
        size = (self.image_size, self.image_size)
        pixels = np.asarray(image.resize(size, INTERPOLATION[self.interpolation], box=box))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, 3, H, W) to the network's float32 input, channels last."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        images = (images.float() / 255 - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Convert logits (B, C) to probabilities with the activation used in training.

        With softmax, used by `loss: kl_classes`, those of an image sum to 1.
        """
        return ACTIVATIONS[self.activation](logits)


def fitting_args(
    model: str, classes: list[str], model_args: dict[str, Any], image_size: int
) -> dict[str, Any]:
    """`model_args`, with timm's `img_size` if the network needs it for this image size.

    Tested with one image, without changing the state of random numbers. Raises UserError if the
    arguments give no classifier of RGB images of that size.
    """
    with torch.random.fork_rng(devices=[]):
        first = _misfit(model, classes, model_args, image_size)
        if first is None:
            return model_args
        sized = {"img_size": image_size, **model_args}
        if _misfit(model, classes, sized, image_size) is None:
            return sized
        config = timm.models.get_pretrained_cfg(model)
        own = model_args.get("img_size") or (config.input_size[1] if config else image_size)
        if _misfit(model, classes, model_args, own) is None:
            raise UserError(
                f"training: model {model!r} takes no images of {image_size} x {image_size} "
                f"pixels; its own are {own} x {own}: set image_size to {own}"
            ) from first
    arguments = f" with {model_args}" if model_args else ""
    raise UserError(
        f"training: model {model!r}{arguments} is not a classifier of RGB images of {image_size} x "
        f"{image_size} pixels: {first_line(first)}"
    ) from first


def _misfit(
    model: str, classes: list[str], arguments: dict[str, Any], size: int
) -> Exception | None:
    """The error for an image of width and height `size`; None if there is none."""
    try:
        network = timm.create_model(model, num_classes=len(classes), **arguments).eval()
        with torch.inference_mode():
            logits = network(torch.zeros(1, 3, size, size))
        if not isinstance(logits, Tensor) or logits.shape != (1, len(classes)):
            raise ValueError("it does not give one logit per class")
    except Exception as error:
        return error
    return None


def new_classifier(
    model: str, classes: list[str], model_args: dict[str, Any], weights: str | None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Create a timm network with a head for `classes`, and its data config (mean, std, ...).

    `weights` is `timm` for its pretrained weights, a weights file, or None for random
    initialisation. Raises UserError if the model is unknown or its weights are not available.
    """
    if weights not in (None, "timm") and not Path(weights).is_file():
        what = "is a folder; give the file in it" if Path(weights).is_dir() else "no such file"
        raise UserError(f"training: weights {weights}: {what} ('timm' downloads timm's own)")
    overlay = {"file": weights} if weights not in (None, "timm") else None
    try:
        arguments = dict(num_classes=len(classes), **model_args)
        state = torch.get_rng_state()
        network = fresh = timm.create_model(model, **arguments)
        if weights is not None:
            torch.set_rng_state(state)
            with warnings.catch_warnings():
                # The error explains what is wrong with a TorchScript archive, and what to do.
                warnings.filterwarnings("ignore", ".*looks like a TorchScript archive")
                network = timm.create_model(
                    model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
                )
            _check_loaded(network, fresh)
    except Exception as error:
        source = {None: "", "timm": " with timm's weights"}.get(weights, f" with {weights}")
        raise UserError(
            f"training: model {model!r}{source} cannot be made: {_why(error, model, weights)}"
        ) from error
    data = timm.data.resolve_model_data_config(network)
    if data["interpolation"] not in INTERPOLATION:
        data["interpolation"] = "bicubic"
    return network.to(memory_format=torch.channels_last), data


def _why(error: Exception, model: str, weights: str | None) -> str:
    if weights is None:
        return first_line(error)
    if weights != "timm":
        return why_not_loaded(error, [Path(weights)])
    config = timm.models.get_pretrained_cfg(model)
    if config is None:
        return first_line(error)
    names = [config.hf_hub_filename or "model.safetensors", "pytorch_model.bin"]
    return why_not_loaded(error, cached_files(config.hf_hub_id or "", names), cached=True)


def network_and_card(
    settings: Network, classes: list[str], **further: Any
) -> tuple[torch.nn.Module, Card]:
    """A network with these `settings` and a head for `classes`, and its card.

    Raises UserError as `fitting_args` and `new_classifier` do.
    """
    fitting = fitting_args(settings.model, classes, settings.model_args, settings.image_size)
    network, data = new_classifier(settings.model, classes, fitting, settings.weights)
    card = Card(
        model=settings.model,
        model_args=fitting,
        classes=classes,
        image_size=settings.image_size,
        mean=list(data["mean"]),
        std=list(data["std"]),
        interpolation=data["interpolation"],
        **further,
    )
    return network, card


def _check_loaded(network: torch.nn.Module, fresh: torch.nn.Module) -> None:
    """Raise ValueError if a weight outside the head is still that of a `fresh` network.

    timm loads the weights that it finds, and nothing at all from a file of another model.
    """
    head = network.pretrained_cfg.get("classifier") or ()
    head = (head,) if isinstance(head, str) else tuple(head)
    start = dict(fresh.named_parameters())
    for name, weight in network.named_parameters():
        # Vectors may keep their initial values, such as the zeros of a bias.
        if weight.dim() > 1 and not name.startswith(head) and torch.equal(weight, start[name]):
            raise ValueError(f"they do not contain {name}, so they are from another model")


def start_head(network: torch.nn.Module, labels: Tensor) -> None:
    """Initialise a head so that it predicts each class's mean label for every image.

    `labels` float32 (N, C). The bias is the logit of the mean; for a softmax head the prediction is
    the mean only up to a common scale. Otherwise the first steps would unlearn a random head, and
    damage the weights below (Lin et al., 2017, section 3.3). Means are kept within 0.01..0.99.
    """
    head = network if isinstance(network, torch.nn.Linear) else network.get_classifier()
    if getattr(head, "bias", None) is not None:
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.logit(labels.mean(dim=0), eps=0.01))


def save_classifier(network: torch.nn.Module, card: Card, folder: Path) -> None:
    """Write the model folder: weights as safetensors, and finally the card as JSON."""
    with replacing(folder / WEIGHTS) as part:
        # Not with save_file, whose error on a full disk is not an OSError.
        part.write_bytes(save({k: v.contiguous().cpu() for k, v in network.state_dict().items()}))
    write_text(folder / CARD, json.dumps(asdict(card), indent=2, ensure_ascii=False) + "\n")


def load_classifier(folder: Path, device: torch.device) -> tuple[torch.nn.Module, Card]:
    """Load a model folder, in evaluation mode.

    Raises UserError if a file is missing or has another schema version, or if weights and card do
    not match.
    """
    try:
        values = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            check_version(folder / CARD, values)
        card = TypeAdapter(Card).validate_python(asdict(Card(**values)))
        if elsewhere := ELSEWHERE & set(card.model_args):
            raise ValueError(f"{CARD} names weights outside the folder ({', '.join(elsewhere)})")
        network = timm.create_model(card.model, num_classes=len(card.classes), **card.model_args)
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder}: not a model folder, {CARD} is missing") from error
    except Exception as error:  # an arbitrary card can make timm raise anything
        reason = " ".join(str(error).split())[:300] or first_line(error)
        raise UserError(f"{folder}: the model cannot be loaded: {reason}") from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: not a model folder, {WEIGHTS} is missing")
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:
        reason = why_not_loaded(error, [folder / WEIGHTS])
        raise UserError(f"{folder / WEIGHTS}: the model cannot be loaded: {reason}") from error
    return network.eval().to(device, memory_format=torch.channels_last), card
