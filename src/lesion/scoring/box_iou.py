"""How well objects fill the boxes asked for them: mean intersection over union, see `_boxes`.

Over many images its mean is also the area under the curve of successes by threshold of IoU.
"""

from lesion.scoring._boxes import BoxMetric


class BoxIou(BoxMetric):
    pass
