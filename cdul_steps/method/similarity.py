"""CLIP's scores from embeddings."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale float vectors (..., D) to norm 1, in float32. A zero or NaN vector becomes NaN."""
    vectors = np.asarray(vectors, dtype=np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def class_embedding(prompts: np.ndarray) -> np.ndarray:
    """Embed a class from all its prompts (P, D): the mean of the unit vectors, normalised again.

    Returns float32 (D,). Source: CLIP's prompt ensembling (Radford et al., 2021, section 3.1.4).
    """
    return unit(unit(prompts).mean(axis=0))


def cosine(view_vectors: np.ndarray, class_vectors: np.ndarray) -> np.ndarray:
    """Cosine `p[i,v,c]` of the view embeddings (..., D) and the class embeddings (C, D).

    Returns float32 (..., C). Both sides are normalised here, so half-precision input is fine.
    """
    return unit(view_vectors) @ unit(class_vectors).T


def temperature(logit_scale: float) -> float:
    """`tau = 1 / logit_scale`, where `logit_scale` is the factor itself (100 for OpenAI's CLIP).

    open_clip's parameter is its logarithm; dividing cosines by the logarithm instead would flatten
    every score to 1/C.
    """
    return 1.0 / logit_scale


def scores(
    cosines: np.ndarray, tau: float, class_count: int | None = None, bias: float = 0.0
) -> np.ndarray:
    """`S[i,v,:] = softmax_c(p[i,v,:] / tau + b_c)` (CDUL, section 3.1), float32, shape unchanged.

    `b_c` is 0 for the first `class_count` columns (by default all), and `bias` for the context
    after them (see `context_bias`).
    """
    logits = np.asarray(cosines, dtype=np.float32) / np.float32(tau)
    if class_count is not None and bias:
        logits[..., class_count:] += np.float32(bias)
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def sigmoid_scores(cosines: np.ndarray, tau: float, bias: float) -> np.ndarray:
    """`S[i,v,c] = sigmoid(p[i,v,c] / tau + bias)`, independently per class, float32, same shape.

    For models that were trained in this way; `bias` is their `logit_bias`. Source: SigLIP (Zhai et
    al., ICCV 2023, section 3.2).
    """
    odds_against = np.asarray(cosines, dtype=np.float32) / np.float32(-tau)
    odds_against -= np.float32(bias)
    # For a logit below -88 the odds are infinite in float32, and the score is 0.
    with np.errstate(over="ignore"):
        np.exp(odds_against, out=odds_against)
    odds_against += 1
    return np.reciprocal(odds_against, out=odds_against)
