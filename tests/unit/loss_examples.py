"""Losses by name, and examples for them."""

from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cdul_steps.method.loss_functions import (
    FUNCTIONS,
)

ASL = {"gamma_positive": 0.5, "gamma_negative": 3.0, "margin": 0.1}
EXPECTED = 1.5
OPTIONS = {"asl": ASL, "epr": {"expected_positives": EXPECTED}}
BY_NAME = {name: partial(loss, **OPTIONS.get(name, {})) for name, loss in FUNCTIONS.items()}
# It also learns the labels, so it needs an additional table.
BY_NAME.pop("role")
shapes = st.tuples(st.integers(1, 4), st.integers(2, 5))


@st.composite
def pairs(draw):
    """Logits and labels of one shape, in double precision."""
    shape = draw(shapes)
    logits = draw(arrays(np.float64, shape, elements=st.floats(-6, 6)))
    labels = draw(arrays(np.float64, shape, elements=st.floats(0.01, 0.99)))
    return torch.from_numpy(logits), torch.from_numpy(labels)
