"""How to use the weights of a CLIP, if they do not record it themselves."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict


@dataclass(frozen=True)
class Recipe:
    """What a CLIP's weights need besides the architecture; without it, the vectors are wrong.

    `preprocess` has the keys of open_clip's PreprocessCfg; `quick_gelu` is OpenAI's activation.
    """

    preprocess: dict[str, Any]
    quick_gelu: bool

    @classmethod
    def of_tag(cls, model: str, tag: str) -> "Recipe":
        """Open_clip's recipe for the weights called `tag`; its defaults if there is no such tag."""
        config = open_clip.get_pretrained_cfg(model, tag)
        by_name = (open_clip.get_model_config(model) or {}).get("quick_gelu")
        preprocess = merge_preprocess_dict(PreprocessCfg(), config)
        # The network defines the size.
        del preprocess["size"]
        return cls(preprocess, bool(by_name or config.get("quick_gelu")))

    @classmethod
    def of_file(cls, model: str) -> "Recipe":
        """The recipe for a file, which has none: what all tags of its model share, or defaults."""
        recipes, default = list(_recipes_of_tags(model).values()), cls.of_tag(model, "")
        return cls(
            _shared([r.preprocess for r in recipes], default.preprocess),
            _shared([r.quick_gelu for r in recipes], default.quick_gelu),
        )

    def __str__(self) -> str:
        numbers = (
            f"{name} {' '.join(f'{value:.4g}' for value in self.preprocess[name])}"
            for name in ("mean", "std")
        )
        names = self.preprocess["interpolation"], self.preprocess["resize_mode"]
        return ", ".join([*numbers, *names, "QuickGELU" if self.quick_gelu else "GELU"])


def _shared(values: list[Any], default: Any) -> Any:
    return values[0] if values and all(v == values[0] for v in values) else default


def _recipes_of_tags(model: str) -> dict[str, Recipe]:
    return {
        tag: Recipe.of_tag(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)
    }


def model_for_file(model: str, recipe: Recipe) -> str | None:
    """The model name with which a file gets this recipe; None if there is none."""
    names = [n for n in (model, f"{model}-quickgelu") if n in open_clip.list_models()]
    return next((name for name in names if Recipe.of_file(name) == recipe), None)


def assumed(model: str, pretrained: str | None) -> str | None:
    """The assumptions about weights that do not record how to use them, in words.

    None for a tag, and for a folder or repository whose config records it.
    """
    if pretrained and open_clip.is_pretrained_cfg(model, pretrained):
        return None
    if not pretrained:
        values = json.loads(config_file(model).read_text(encoding="utf-8"))
        said = values.get("preprocess_cfg") or {}
        lacking = [name for name in ("mean", "std") if not said.get(name)]
        if not lacking:
            return None
        return f"its config has no {' and '.join(lacking)}; open_clip's defaults were used"
    recipes, recipe = _recipes_of_tags(model), Recipe.of_file(model)
    taken = f"{pretrained} was taken with {recipe}"
    if not recipes:
        return f"{taken}: open_clip's defaults, because it has no weights of this model"
    others: dict[str | None, list[str]] = {}
    for tag, its in recipes.items():
        if its != recipe:
            others.setdefault(model_for_file(model, its), []).append(tag)
    if not others:
        return f"{taken}, like all of open_clip's weights for this model"
    advice = (
        f"weights of {', '.join(tags)} need "
        + (f"the model {name}" if name else "their folder as 'local-dir:FOLDER'")
        for name, tags in others.items()
    )
    return f"{taken}; {'; '.join(advice)}"


def config_file(model: str) -> Path:
    place, _, name = model.partition(":")
    if place == "local-dir":
        return Path(name, "open_clip_config.json")
    return Path(download_pretrained_from_hf(name, filename="open_clip_config.json"))
