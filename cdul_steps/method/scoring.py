"""The function that turns cosines into scores."""

from typing import NamedTuple

import numpy as np

from cdul_steps.method.choices import WEIGHT
from cdul_steps.method.context import context_bias
from cdul_steps.method.similarity import scores, sigmoid_scores


class Scoring(NamedTuple):
    """A softmax over all names at the temperature `tau`, in which the context counts as at most
    `context_weight` names; or, with a `logit_bias`, an independent sigmoid for each class, which
    ignores the context."""

    tau: float
    logit_bias: float | None = None
    context_weight: float = WEIGHT

    def __call__(self, cosines: np.ndarray, class_count: int) -> np.ndarray:
        """Scores of cosines (..., C+M), whose first `class_count` columns (C) are the classes.

        Returns float32: (..., C+M) for the softmax, (..., C) for the sigmoid.
        """
        if self.logit_bias is not None:
            return sigmoid_scores(cosines[..., :class_count], self.tau, self.logit_bias)
        bias = context_bias(cosines.shape[-1] - class_count, self.context_weight)
        return scores(cosines, self.tau, class_count, bias)
