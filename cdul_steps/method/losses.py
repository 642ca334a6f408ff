"""The losses by name, and what the rest of the project must know of each.

The functions are in `loss_functions`, apart from here, so that the config is checked without torch.
"""

from dataclasses import dataclass
from typing import Literal

LossName = Literal["kl", "kl_reverse", "kl_classes", "bce", "asl", "wan", "epr", "role"]


@dataclass(frozen=True)
class Loss:
    """What a loss is: its description, unit and head, the settings it takes, the labels it needs.

    `settings` are the keys of a training that only some losses use; their values are the keyword
    arguments of its function. With `hard_labels` the labels must be 0 or 1 and stay so.
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
        "binary cross-entropy, to the network the same as `kl`; its label steps go further, to "
        "the side that the network takes",
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
