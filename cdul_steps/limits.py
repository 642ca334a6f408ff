"""Limits on what is decoded. Without Pillow, so that the command line's help can name them."""

MAX_PIXELS = 178_956_970
"""Width times height. Pillow refuses larger images by itself, also where a decoder allocates
memory on opening."""
MAX_BYTES = 1 << 30
"""Size of a file: some decoders read it whole."""
MAX_SCANS = 100
"""Passes over the pixels that a JPEG may ask for. Ten are usual, and each costs as much time as
decoding the image once: a few megabytes can ask for hours."""

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy's older generators take."""
