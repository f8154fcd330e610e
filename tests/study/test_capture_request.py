"""What may be asked of attention maps."""

from __future__ import annotations

import pytest

from lesion.errors import RequestError
from lesion.study.capture import Capture, pixels

ASKED = {"name": "maps", "layers": None, "steps": [0.0, 1.0], "branch": "cond", "heads": "mean", "reduce": "mean",
         "tokens": "prompt"}  # fmt: skip


def of(guided=True, **changes):
    return Capture.of({**ASKED, **changes}, 4, guided)


def test_a_request_is_read():
    assert of(name="none") is None
    assert of() == Capture()
    one = of(layers=["up*"], steps=[[0, 0.5], [0.75, 1]], branch="both", heads="each", reduce="each", tokens="all")
    assert one == Capture(("up*",), ((0.0, 0.5), (0.75, 1.0)), "both", True, True, "all")
    assert one.chosen(("down.0", "up.0", "up.1")).layers == ("up.0", "up.1")
    assert of().chosen(("down.0",)).digest != of().chosen(("up.0",)).digest != of(heads="each").chosen(("up.0",)).digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "map"}, "capture: got 'map'; allowed: none, maps"),
        ({"layers": ["re:("]}, "capture.layers: 're:(' is no regular expression"),
        ({"layers": [3]}, "capture.layers: must be null or layer paths"),
        ({"steps": [0.5, 0.2]}, "capture.steps: must have start < end"),
        ({"steps": [0.3, 0.4]}, "capture.steps: [0.3, 0.4] covers none of the 4 steps"),
        ({"branch": "left"}, "capture.branch: got 'left'; allowed: cond, uncond, both"),
        ({"branch": "both", "guided": False}, "capture.branch: without guidance there is one branch; allowed: cond"),
        ({"heads": "all"}, "capture.heads: got 'all'; allowed: mean, each"),
        ({"reduce": "sum"}, "capture.reduce: got 'sum'; allowed: mean, each"),
        ({"tokens": "words"}, "capture.tokens: got 'words'; allowed: prompt, all"),
    ],
)
def test_a_wrong_one_is_refused(changes, words):
    with pytest.raises(RequestError) as error:
        of(**changes)
    assert str(error.value).startswith(words)


def test_places_of_an_sd15_layer():
    """The table of SD 1.5 at 512 pixels: 64 x 64 latents, 4 levels."""
    paths = {"down_blocks.0.attentions.1": 4096, "down_blocks.2.attentions.0": 256, "mid_block.attentions.0": 64,
             "up_blocks.1.attentions.2": 256, "up_blocks.3.attentions.0": 4096}  # fmt: skip
    assert {path: pixels(path, 64, 64, 4) for path in paths} == paths
    assert pixels("mid_block.attentions.0", 9, 12, 3) == 3 * 3
    assert pixels("transformer_blocks.3", 32, 48, 0) == 32 * 48
