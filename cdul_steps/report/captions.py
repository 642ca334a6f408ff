"""Titles and captions of the report's figures: for the page, and for Snakemake's own report."""

TITLES = {
    "scores": "Scores of whole images and of snippets",
    "average_precision": "Average precision of every class",
    "precision_recall": "Precision and recall",
    "learning": "Learning curves",
    "class_maps": "Class activation maps",
    "cooccurrence": "Labels that occur together",
}
CAPTIONS = {
    "scores": "How often CLIP gives which score, over all pairs of image and class of the train "
    "split: one curve for the whole images, one for their snippets, one for the pseudo-labels "
    "made from both, as the classifier learns from them. Scores of one view, at the labels' "
    "temperature, sum to 1 over the classes (and context names, where there are any), so most are "
    "near 0; note the logarithmic axis. "
    "Labels with a setting 'positives' are raised to sum to it. Where the truth is known, the left "
    "panel has the classes that are in the image and the right one those that are not: good scores "
    "stand to the right in the left panel and to the left in the right panel. Dotted line, where "
    "classes are not standardised: zeta; from it on the best snippet score of a class counts, "
    "below it the worst.",
    "average_precision": "One pair of bars a class, sorted by the classifier: how well the images "
    "with that class are ranked before those without it, by CLIP's labels, made as the "
    "pseudo-labels are, and by the classifier that learnt from these, on the same images. 100 is a "
    "perfect ranking. In brackets: the images with the class; a ranking by chance reaches about "
    "their share of all images. Vertical lines: the means over the classes (mAP), dotted of CLIP's "
    "labels, dashed of the classifier.",
    "precision_recall": "Left: all pairs of image and class in one ranking; lowering the threshold "
    "moves along a curve from left (few labels, mostly right) to right (all labels found, many "
    "wrong ones besides). Higher is better; the dots mark a threshold of 0.5. Right: the "
    "classifier's curve of each class (grey), with the classes of the highest, middle and lowest "
    "average precision named.",
    "learning": "Against the epoch, from top to bottom: the loss that training descends; mAP "
    "where the truth is known, which learning never sees (refined labels, classifier on the images "
    "it learns from, classifier on test images); and how far the label step moved a pseudo-label "
    "in the mean, 0 while labels are fixed. Labels that keep moving while their mAP falls follow "
    "a network that is not yet good enough.",
    "class_maps": "Where the classifier sees its three most probable labels (Grad-CAM on the last "
    "convolutional features), on images at even steps through the split, not chosen by hand. "
    "What speaks for the label is left in full colour, the rest fades to white; the line is half "
    "of the map's maximum. The number is the label's probability (0 to 1), and where the truth is "
    "known the word beside it says whether the class is in the image. A map is as coarse as the "
    "features, and scaled to its own maximum: it says where, not how much. Where all is pale, "
    "nothing speaks for the label.",
    "cooccurrence": "Of the images with the label of the row, the share that has the label of the "
    "column too; the diagonal, framed, counts the images with the label. First as the classifier "
    "predicts at its threshold, then, where known, the truth of the same images: where a pair is "
    "dark in the first alone, the classifier may take one for the other. Grey row: no image has "
    "the label.",
}
"""By name of the figure: what it shows and how to read it."""
