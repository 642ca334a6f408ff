"""The words that settings, options and functions of the method choose from.

Apart from the functions, so that neither the config nor the command line imports NumPy or torch.
"""

from typing import Literal

Construction = Literal["global", "local_mean", "local_max", "aggregate", "final"]
Difficult = Literal["ignore", "negative", "positive"]
AveragePrecision = Literal["all", "voc07"]
Positives = Literal["soft", "top1", "threshold"]
