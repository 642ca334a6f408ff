"""CDUL: a multi-label image classifier trained on unlabelled images, with CLIP as the teacher."""

__version__ = "0.1.0"
