"""`mask`: queries (of the image; in an encoder of the text) cannot see the chosen text tokens: their softmax runs over
the other keys alone.
"""

from __future__ import annotations

from lesion.surgery.intervention import Intervention


class Mask(Intervention):
    """Nothing in the place of tokens, and nothing kept of their share of the attention."""

    changes = "tokens"
    kinds = ("cross_attention", "text_to_image")
    heads = False
    of_tokens = ("keys",)
    once = True
    compiled = False
