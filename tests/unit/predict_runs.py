"""Run a prediction as a command, and read its classes."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import tiny

from cdul_steps.steps.predict import ShardImages, SplitImages, predict_images

CLASSES = ["cat", "dog", "potted plant"]


def run(model: Path, output: Path, *inputs: Path, **changes) -> pd.DataFrame:
    if "manifest" in changes:
        inputs = ShardImages(changes.pop("manifest"), changes.pop("images"))
    elif "images" in changes:
        inputs = SplitImages(changes.pop("images"), changes.pop("split"))
    values = {
        "threshold": None,
        "max_pixels": tiny.MAX_PIXELS,
        **changes,
    }
    predict_images(model=model, inputs=inputs, output=output, **tiny.on(values))
    return pq.read_table(output).to_pandas() if output.suffix == ".parquet" else None
