"""The allowed values of settings and options of the method, and shared defaults.

Separate from the functions, so that the config and the command line do not import NumPy or torch.
"""

from typing import Literal

Construction = Literal["global", "local_mean", "local_max", "aggregate", "final"]
Scores = Literal["softmax", "sigmoid"]
Difficult = Literal["ignore", "negative", "positive"]
AveragePrecision = Literal["all", "voc07"]
Positives = Literal["soft", "top1", "threshold"]

WEIGHT = 50.0
"""The number of names that the context counts as, at most: see `method.context.context_bias`."""
NEARNESS = 0.6
"""Centred cosine from which a context name is taken for a class."""
