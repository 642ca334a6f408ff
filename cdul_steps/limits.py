"""Limits on what is decoded; a module without Pillow, so that the command-line help is fast."""

MAX_PIXELS = 178_956_970
"""Width times height. Pillow itself rejects larger images, even if a decoder allocates memory
on opening."""
MAX_BYTES = 1 << 30
"""File size in bytes: some decoders read the whole file."""
MAX_SCANS = 100
"""Passes over the pixels of a JPEG. Ten are usual, and each takes as long as decoding the image
once: a file of a few megabytes could keep a decoder busy for hours."""

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy's older generators accept."""
