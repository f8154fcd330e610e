"""The share of boxes that an object fills with an intersection over union of at least 0.5, see `_boxes`."""

from lesion.scoring._boxes import BoxMetric


class BoxSuccess(BoxMetric):
    least = 0.5
