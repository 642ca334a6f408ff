"""Context names: what else an image may show. They are part of the softmax but get no labels."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cdul_steps.method.choices import NEARNESS, WEIGHT
from cdul_steps.method.similarity import unit

REFERENCE = (
    """
man, family, football player, parrot, chicken, penguin, monkey, whale, turtle, beetle,
sunflower, potted plant, pasta, sausage, strawberry, teapot, coat, sunglasses, umbrella,
bed, pillow, door, knife, book, screenshot, hammer, sink, mobile phone, violin, golf course,
campfire, van, train, ship, house, tower, greenhouse, harbour, statue, beach, swamp, desert,
clouds, ice, grass, fur, wedding, running, playing in the snow
""".replace("\n", " ")
    .strip()
    .split(", ")
)
"""Names whose mean embedding is the centre of `centred_cosine`. They are fixed, so that the
decision about a name does not depend on the other names in the list."""


def context_bias(names: int, weight: float = WEIGHT) -> float:
    """`b = log(min(1, weight / names))`, which is added to the logit of every context name.

    In the softmax, `names` context names then count as `weight` names, however long the list is; a
    shorter list is not changed.
    """
    return math.log(min(1.0, weight / names)) if names else 0.0


def plain_name(name: str) -> str:
    """A name without case, punctuation and English plurals, so that variants compare equal."""
    words = re.split(r"[\W_]+", unicodedata.normalize("NFC", name).casefold())
    return " ".join(_singular(word) for word in words if word) or name


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        return word[:-1]
    return word


def centred_cosine(
    context: np.ndarray, class_vectors: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """Cosines of context (M, D) and class (C, D) embeddings around a `centre` (D,): (M, C),
    float32 like its arguments.

    Prompts share most of their vector, which comes from the template; the rest shows how close two
    names are, on a scale that depends little on the model and the template.
    """
    return unit(context - centre) @ unit(class_vectors - centre).T


class Near(NamedTuple):
    """A context name that means a class: `nearness` is None if it is the class's own name."""

    name: str
    of: str
    nearness: float | None


def find_near(
    context: Sequence[Sequence[str]],
    classes: Sequence[Sequence[str]],
    nearness: np.ndarray,
    limit: float = NEARNESS,
) -> list[Near]:
    """The context names that mean one of the classes, in order, each with its class.

    Each context entry and class starts with its name, followed by aliases. A context name means a
    class if any of their names are equal up to case and plural, or if its `nearness` (M, C), the
    centred cosine to the closest alias of the class, is above `limit`.
    """
    owner: dict[str, str] = {}
    for names in classes:
        for name in names:
            owner.setdefault(plain_name(name), names[0])
    found = []
    for names, row in zip(context, nearness, strict=True):
        same = [owner[plain] for plain in map(plain_name, names) if plain in owner]
        best = int(row.argmax())
        if same:
            found.append(Near(names[0], same[0], None))
        elif row[best] > limit:
            found.append(Near(names[0], classes[best][0], float(row[best])))
    return found


class Largest(NamedTuple):
    """The context of images: its `share` of all scores, float32 (N,), and its largest names.

    `names` int (N, K) are columns of the scores, largest first; `scores` float32 (N, K) are theirs.
    """

    share: np.ndarray
    names: np.ndarray
    scores: np.ndarray


def largest_context(scores: np.ndarray, class_count: int, count: int) -> Largest:
    """The context's part of scores (N, C+M): its whole share, and its `count` largest names.

    The first `class_count` columns are the classes. Without context the share is 0 and there are no
    names.
    """
    context = scores[:, class_count:]
    order = np.argsort(-context, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(context, order, axis=1)
    return Largest(context.sum(axis=1), order + class_count, values)
