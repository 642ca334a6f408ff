"""Third-party networks, loaded as data."""

import os

# Older releases of open_clip and timm load checkpoints as pickles, which can run code.
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
