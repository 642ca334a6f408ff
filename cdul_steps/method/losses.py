"""The losses by name, and what the rest of the project needs to know about each.

The functions are in `loss_functions`, so that the config can be checked without torch.
"""

from dataclasses import dataclass
from typing import Literal

LossName = Literal["kl", "kl_reverse", "kl_classes", "bce", "asl", "wan", "epr", "role"]


@dataclass(frozen=True)
class Loss:
    """A loss: its description, unit and head, the settings that it takes, the labels that it needs.

    `settings` are the training keys that only some losses use; their values are the keyword
    arguments of its function. With `hard_labels` the labels must be 0 or 1 and must not change.
    """

    description: str
    unit: Literal["nats", "no unit"] = "no unit"
    head: Literal["sigmoid", "softmax"] = "sigmoid"
    settings: tuple[str, ...] = ()
    hard_labels: bool = False


LOSSES: dict[LossName, Loss] = {
    "kl": Loss("KL(label || network), one Bernoulli distribution per class", unit="nats"),
    "kl_reverse": Loss("KL(network || label), one Bernoulli distribution per class", unit="nats"),
    "kl_classes": Loss(
        "KL(label || network) of one softmax over all classes; the classifier's probabilities "
        "then sum to 1, so `threshold` should be lower",
        unit="nats",
        head="softmax",
    ),
    "bce": Loss(
        "binary cross-entropy, for the network the same as `kl`; its label steps are larger, "
        "towards the network's prediction",
        unit="nats",
    ),
    "asl": Loss("asymmetric loss", settings=("asl",)),
    "wan": Loss("weak assume-negative", hard_labels=True),
    "epr": Loss(
        "expected-positive regularisation", settings=("expected_positives",), hard_labels=True
    ),
    "role": Loss(
        "online label estimation", settings=("expected_positives", "role"), hard_labels=True
    ),
}
