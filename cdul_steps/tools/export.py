"""Command export: write a trained classifier as one file that runs without this project."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from cdul_steps.data.files import check_replaceable, digest, replacing, write_text
from cdul_steps.errors import UserError, first_line
from cdul_steps.models.classifier import CARD, WEIGHTS, Card, load_classifier
from cdul_steps.progress import note
from cdul_steps.provenance import versions
from cdul_steps.report.words import CHECKED

KEY = "cdul"
"""Metadata key under which the exported file contains the text of `model.json`."""
TOLERANCE = 1e-4
"""Maximum difference between the exported file's results and PyTorch's, relative to the largest
logit, or to 1."""
MODEL_CARD = "README.md"


def _example(library: str, load: str, run: str) -> str:
    return f"""\
import json, sys
import numpy as np
import {library}
from PIL import Image, ImageOps

{load}
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
image = image.resize(about["resize"]["size"], Image.Resampling[about["resize"]["filter"]])
scores = {run}
print({{name: round(float(s), 3) for name, s in zip(about["classes"], scores)}})
"""


EXAMPLES = {
    "onnx": _example(
        "onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        'about = json.loads(session.get_modelmeta().custom_metadata_map["cdul"])',
        'session.run(None, {"images": np.asarray(image)[None]})[0][0]',
    ),
    "pt2": _example(
        "torch",
        'model = torch.export.load("model.pt2", extra_files=(extra := {"cdul": ""})).module()\n'
        'about = json.loads(extra["cdul"])',
        "model(torch.tensor(np.asarray(image)[None]))[0]",
    ),
    "torchscript": _example(
        "torch",
        'model = torch.jit.load("model.pt", _extra_files=(extra := {"cdul": ""}))\n'
        'about = json.loads(extra["cdul"])',
        "model(torch.tensor(np.asarray(image)[None]))[0]",
    ),
}
"""For each format, a program that scores an image with only the exported file."""


class Exported(torch.nn.Module):
    """A classifier that includes its normalisation and its activation.

    It maps uint8 RGB images (B, H, W, 3), as in Pillow and NumPy, to float32 probabilities (B, C).
    Resizing is not included: a graph's resize differs from Pillow's and would change the scores.
    """

    def __init__(self, network: torch.nn.Module, card: Card, activated: bool = True) -> None:
        super().__init__()
        self.network, self.card, self.activated = network, card, activated
        # Buffers instead of `Card.normalize`, whose constants a trace would bind to one device.
        self.register_buffer("mean", 255 * torch.tensor(card.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(card.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities of images; logits if not `activated`."""
        pixels = images.permute(0, 3, 1, 2).float()
        logits = self.network((pixels - self.mean) / self.std)
        return self.card.probabilities(logits) if self.activated else logits


def _write_onnx(model: Exported, example: Tensor, path: Path, about: str) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    program.model.metadata_props[KEY] = about
    program.save(path, external_data=False)


def _write_pt2(model: Exported, example: Tensor, path: Path, about: str) -> None:
    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (example,), dynamic_shapes=batch)
    torch.export.save(program, path, extra_files={KEY: about})


def _write_torchscript(model: Exported, example: Tensor, path: Path, about: str) -> None:
    torch.jit.save(torch.jit.trace(model, example), path, _extra_files={KEY: about})


def _run_onnx(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _run_pt2(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).numpy()


def _run_torchscript(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    module = torch.jit.load(path)
    return lambda images: module(torch.from_numpy(images)).numpy()


FORMATS: dict[str, tuple[str, Callable, Callable]] = {
    "onnx": ("model.onnx", _write_onnx, _run_onnx),
    "pt2": ("model.pt2", _write_pt2, _run_pt2),
    "torchscript": ("model.pt", _write_torchscript, _run_torchscript),
}
"""Formats by name: the file name, the function that writes it, and the function that runs it."""


def _about(card: Card, weights: Path, format_: str) -> dict[str, Any]:
    side, classes = card.image_size, len(card.classes)
    return {
        "file": FORMATS[format_][0],
        "format": format_,
        "classes": card.classes,
        "threshold": card.threshold,
        "thresholds": card.thresholds,
        "checked": card.checked,
        "resize": {
            "size": [side, side],
            "filter": card.interpolation.upper(),
            "meaning": "the whole image, resized to [width, height] with Pillow's filter, without "
            "keeping the aspect ratio",
        },
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["batch", side, side, 3],
            "meaning": "RGB, 0..255, after EXIF rotation; the file normalises the pixels itself",
        },
        "output": {
            "name": "probabilities",
            "dtype": "float32",
            "shape": ["batch", classes],
            "activation": card.activation,
            "meaning": "one probability per class, in the order of 'classes'",
        },
        "normalisation": {"mean": card.mean, "std": card.std, "where": "inside the file"},
        "model": card.model,
        "weights": digest(weights),
        "provenance": card.provenance,
        "software": versions("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
    }


def _difference(
    run: Callable[[np.ndarray], np.ndarray],
    network: torch.nn.Module,
    card: Card,
    activated: bool,
) -> float:
    """The largest difference from PyTorch's results on noise, for two batch sizes.

    For probabilities or, if not `activated`, for logits, relative to the largest of them.
    """
    random = np.random.default_rng(0)
    side, differences = card.image_size, []
    for batch in (1, 3):
        images = random.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        logits = network(card.normalize(pixels))
        expected = (card.probabilities(logits) if activated else logits).numpy()
        scale = np.abs(expected).max(initial=1)
        differences.append(np.abs(run(images) - expected).max() / scale)
    return float(np.max(differences))


def export_classifier(*, model: Path, format_: str, output: Path) -> None:
    """Write a model folder's classifier as one file of `format_`: see FORMATS.

    The folder `output` gets the file, `model.json` (classes, preprocessing, input and output,
    provenance; the file contains the same text), and `README.md`: a program that runs it, and the
    model card of the model folder. Before the file is put in place, it is run and compared with
    PyTorch. The same is done with a file that outputs logits, because a wrong file could agree if
    all probabilities are near 0 or 1. Raises UserError for a folder that is not a model folder, for
    a model that the format does not support, and if the results differ by more than TOLERANCE.
    """
    if output.resolve() == model.resolve():
        raise UserError(f"{output}: is the model folder itself; export to another folder")
    ours = (CARD, MODEL_CARD, *(file for file, _, _ in FORMATS.values()))
    check_replaceable(output, ours)
    network, card = load_classifier(model, torch.device("cpu"))
    name, write, runner = FORMATS[format_]
    note(f"export: writing {output / name}, then comparing it with PyTorch")
    about = json.dumps(_about(card, model / WEIGHTS, format_), indent=2, ensure_ascii=False)
    # Two images, because a batch size of one would be exported as a constant.
    example = torch.zeros(2, card.image_size, card.image_size, 3, dtype=torch.uint8)
    differences = []
    with replacing(output / name) as part, torch.inference_mode():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for activated, file in ((True, part), (False, part.with_name(f"logits-{name}"))):
                    exported = Exported(network, card, activated).eval().requires_grad_(False)
                    write(exported, example, file, about)
                    differences.append(_difference(runner(file), network, card, activated))
        except Exception as error:
            raise UserError(
                f"{model}: {card.model} cannot be written as {format_}: {first_line(error)}"
            ) from error
        difference = float(np.max(differences))
        if not difference <= TOLERANCE:
            raise UserError(
                f"{model}: as {format_}, {card.model} differs from PyTorch by {difference:.2g}, "
                f"more than {TOLERANCE:g}; try another format"
            )
    write_text(output / CARD, about + "\n")
    readme = _readme(model, name, format_)
    write_text(output / MODEL_CARD, readme)
    if format_ == "torchscript":
        note("export: PyTorch has deprecated TorchScript; use pt2 instead")
    if card.checked and CHECKED not in readme:
        note(
            f"export: {output / MODEL_CARD} does not have the thresholds of 'cdul check' yet; "
            "'cdul run' updates the model card, then export again"
        )
    note(f"export: {output / name}; largest difference from PyTorch {difference:.1g}")


def _readme(model: Path, name: str, format_: str) -> str:
    needs = {"onnx": "`onnxruntime`, `numpy` and `pillow`"}.get(format_, "`torch` and `pillow`")
    text = (
        f"# {name}\n\nThe input is uint8 RGB images (batch, height, width, 3), the output is "
        f"probabilities. `{CARD}` has the classes, and the size and filter for resizing. The "
        f"following program needs only {needs}:\n\n```python\n{EXAMPLES[format_]}```\n"
    )
    card = model / MODEL_CARD
    return f"{text}\n{card.read_text(encoding='utf-8')}" if card.is_file() else text
