"""`steering_off`: the layer's attention maps are left out of the loss of `steering=layout`; all else stays.

It asks which layers steer a layout: the baseline is steered by all of `steering.layers`. A window says in which
denoising steps, and a strength between 0 and 1 leaves the layer a smaller weight in the loss.
"""

from __future__ import annotations

from lesion.surgery.intervention import Intervention


class SteeringOff(Intervention):
    """Nothing of the site is changed: the client that steers reads the lesion itself."""

    changes = "loss"
    kinds = ("cross_attention", "text_to_image", "joint_attention")
    branches = ("both", "cond")  # the unconditional half steers nothing
    heads = False
    compiled = False
