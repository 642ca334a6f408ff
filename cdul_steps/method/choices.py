"""The words that settings, options and functions of the method choose from, and shared defaults.

Apart from the functions, so that neither the config nor the command line imports NumPy or torch.
"""

from typing import Literal

Construction = Literal["global", "local_mean", "local_max", "aggregate", "final"]
Scores = Literal["softmax", "sigmoid"]
Difficult = Literal["ignore", "negative", "positive"]
AveragePrecision = Literal["all", "voc07"]
Positives = Literal["soft", "top1", "threshold"]

WEIGHT = 50.0
"""As how many names the context counts, at most: see `method.context.context_bias`."""
NEARNESS = 0.6
"""Centred cosine from which a context name is taken to mean a class."""
