"""The training of a classifier: its loop, its labels, its images, its processes."""
