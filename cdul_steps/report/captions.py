"""Titles and captions of the report's figures, for the page and for Snakemake's own report."""

TITLES = {
    "scores": "Scores of whole images and of snippets",
    "average_precision": "Average precision of every class",
    "precision_recall": "Precision and recall",
    "estimate": "Precision and recall at each threshold, estimated from answers",
    "learning": "Learning curves",
    "class_maps": "Class activation maps",
    "cooccurrence": "Labels that occur together",
}
CAPTIONS = {
    "scores": "Distribution of CLIP's scores over all pairs of image and class in the train "
    "split: one curve for the whole images, one for their snippets, and one for the pseudo-labels "
    "made from both, on which the classifier is trained. The scores of one view, at the "
    "temperature of the labels, sum to 1 over the classes (and context names, if there are any), "
    "so most of them are near 0; note the logarithmic axis. Labels with the setting 'positives' "
    "are rescaled to sum to it. If the ground truth is known, the left panel shows the classes "
    "that are in the image and the right panel those that are not: good scores are high in the "
    "left panel and low in the right panel. Dotted line, if classes are not standardised: zeta. "
    "From zeta on, the best snippet score of a class counts; below it, the worst.",
    "average_precision": "One pair of bars per class, sorted by the classifier's value. The bars "
    "show how well the images with the class are ranked before those without it, by CLIP's "
    "labels, made like the pseudo-labels, and by the classifier trained on them, on the same "
    "images. 100 is a perfect ranking. In brackets: the number of images with the class; a random "
    "ranking reaches about their share of all images. Vertical lines: the means over the classes "
    "(mAP), dotted for CLIP's labels, dashed for the classifier.",
    "precision_recall": "Left: all pairs of image and class in one ranking. As the threshold "
    "falls, a curve runs from left (few labels, mostly right) to right (all labels found, but "
    "also many wrong ones). Higher is better; the dots mark a threshold of 0.5. Right: the "
    "classifier's curve for each class (grey); the classes with the highest, middle and lowest "
    "average precision are named.",
    "estimate": "One panel for all classes with a common threshold, and one for each class that "
    "has enough answers of its own. As the threshold rises, fewer pairs of image and class are "
    "named: more of the named pairs are right (precision, solid line), but more of the true pairs "
    "are missed (recall, dashed line). At each threshold, the shaded area contains the true value "
    "in 90 of 100 checks. A line ends where there are too few answers. Dotted vertical line: the "
    "threshold in use.",
    "learning": "By epoch, from top to bottom: the training loss; mAP if the ground truth is "
    "known, which is never used for training (refined labels, classifier on the training images, "
    "classifier on the test images); and the mean change of a pseudo-label in the label step, "
    "which is 0 while labels are fixed. If labels keep moving while their mAP falls, they follow "
    "a network that is not yet good enough.",
    "class_maps": "The image regions behind the classifier's three most probable labels (Grad-CAM "
    "on the last convolutional features). The images are evenly spaced in the split, not chosen "
    "by hand. Regions that support the label keep their full colour, the rest fades to white; the "
    "line is at half of the map's maximum. The number is the label's probability (0 to 1). If the "
    "ground truth is known, the word next to it states whether the class is in the image. A map "
    "is as coarse as the features and scaled to its own maximum: it shows where, not how much. If "
    "everything is pale, nothing supports the label.",
    "cooccurrence": "Share of the images with the label of the row that also have the label of "
    "the column. The framed diagonal contains the number of images with the label. The first "
    "matrix shows the classifier's predictions at its threshold; the second, if known, shows the "
    "ground truth of the same images. If a pair is dark only in the first, the classifier may "
    "confuse the two labels. Grey row: no image has the label.",
}
"""By figure name: what the figure shows and how to read it."""
