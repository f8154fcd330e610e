"""What a scorer does to images before its model sees them, on a GPU in batches, with the very values of Pillow.

Pillow's bicubic resizing of bytes works in whole numbers: weights in units of 2^-22, along rows and along columns one
after the other, each result rounded and cut to a byte (`ImagingResample` in its src/libImaging/Resample.c). A float64
holds all of its sums exactly, in whatever order they are added, so a product of matrices gives the same bytes. What
follows, scaling and normalising, depends on channel and byte alone: it is looked up in a table that the scorer's own
code made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

UNIT = 1 << 22  # of Pillow's weights
AT_ONCE = 1 << 26  # bytes of float64 pixels that are resized together
Box = tuple[int, int, int, int]  # height and width resized to; top and left of the crop


def resized(images: torch.Tensor, height: int, width: int, columns_first: bool = False) -> torch.Tensor:
    """Pixels (n, 3, height, width), uint8, as `Image.resize` with BICUBIC makes them of images (n, 3, h, w), uint8.

    columns_first: in which order; Pillow's choice depends on the sizes and on its version.
    """
    import torch

    each = 8 * 3 * max(images.shape[2], height) * max(images.shape[3], width)
    made = []
    for part in images.split(max(1, AT_ONCE // each)):
        made.append(_rows(_columns(part, height), width) if columns_first else _columns(_rows(part, width), height))
    return torch.cat(made)


def _rows(pixels: torch.Tensor, width: int) -> torch.Tensor:
    if pixels.shape[3] == width:
        return pixels
    return _bytes(pixels.double() @ _weights(pixels.shape[3], width).to(pixels.device).T)


def _columns(pixels: torch.Tensor, height: int) -> torch.Tensor:
    if pixels.shape[2] == height:
        return pixels
    return _bytes(_weights(pixels.shape[2], height).to(pixels.device) @ pixels.double())


def _bytes(sums: torch.Tensor) -> torch.Tensor:
    import torch

    return sums.add_(UNIT // 2).div_(UNIT).floor_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=32)
def _weights(size: int, out: int) -> torch.Tensor:
    """Whole numbers (out, size), float64: what each of `size` pixels adds to each of `out`, in units of 1 / UNIT."""
    import torch

    found = np.zeros((out, size))
    scale = size / out
    wide = max(scale, 1.0)
    support = 2.0 * wide
    for place in range(out):
        centre = (place + 0.5) * scale
        first, end = max(0, int(centre - support + 0.5)), min(size, int(centre + support + 0.5))
        values = [_bicubic((x - centre + 0.5) * (1.0 / wide)) for x in range(first, end)]
        total = 0.0
        for value in values:
            total += value
        for x, value in enumerate(values, first):
            weight = (value / total if total else value) * UNIT
            found[place, x] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
    return torch.from_numpy(found)


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -0.5, computed in Pillow's order."""
    x = abs(x)
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0


class Preprocessing:
    """Preprocesses batches of images as `one` does each of them: on a GPU in batches there, else by `one`.

    one: of an image (height, width, 3), uint8, the model's input (3, side, side), float32. box: where an image of some
    height and width is resized to and cropped, None where it is not done so. table: the input (3, 256) of each byte.
    Noise of each size is made both ways first; unless all values are equal, `one` makes all images of that size.
    """

    def __init__(
        self,
        one: Callable[[NDArray[np.uint8]], torch.Tensor],
        side: int,
        box: Callable[[int, int], Box | None],
        table: torch.Tensor,
        device: torch.device,
    ):
        self.one, self.side, self.box, self.table, self.device = one, side, box, table.to(device), device
        # Pillow is faster than a CPU's matrices; mps has no float64.
        self.in_batches = device.type not in ("cpu", "mps")
        self._orders: dict[tuple[int, ...], bool | None] = {}  # of the passes, by shape; None: neither is Pillow's

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Inputs (n, 3, side, side) on the device."""
        import torch

        shapes = {image.shape for image in images}
        if self.in_batches and len(shapes) == 1:
            order = self.order(images[0].shape)
            if order is not None:
                return self.batch(images, order)
        return torch.stack([self.one(image) for image in images]).to(self.device)

    def order(self, shape: tuple[int, ...]) -> bool | None:
        """Whether columns are resized first, so that all values are those of `one`; None where they are so in neither
        order.
        """
        import torch

        if shape not in self._orders:
            noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            orders = (False, True) if self.box(*shape[:2]) else ()
            wanted = self.one(noise)
            equal = (order for order in orders if torch.equal(self.batch([noise], order)[0].cpu(), wanted))
            self._orders[shape] = next(equal, None)
        return self._orders[shape]

    def batch(self, images: Sequence[NDArray[np.uint8]], columns_first: bool) -> torch.Tensor:
        """The same on the device, of images of one size that have a box."""
        import torch

        box = self.box(*images[0].shape[:2])
        assert box is not None
        height, width, top, left = box
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        pixels = resized(pixels, height, width, columns_first)
        pixels = pixels[:, :, top : top + self.side, left : left + self.side].long()
        channels = torch.arange(3, device=self.device)[:, None, None]
        return self.table[channels, pixels]


def of_transforms(steps: Sequence[Any], device: torch.device) -> Preprocessing | None:
    """The preprocessing of open_clip and torchvision: bicubic to the shorter side, the middle, then what looks at each
    pixel alone. None where the steps are others.
    """
    from PIL import Image
    from torchvision import transforms  # type: ignore[import-untyped]

    if len(steps) < 2:
        return None
    resize, crop, *rest = steps
    known = isinstance(resize, transforms.Resize) and isinstance(crop, transforms.CenterCrop)
    if not known or any(type(step).__name__ not in EACH_PIXEL for step in rest):
        return None
    size = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    side = crop.size[0]
    plain = resize.interpolation == transforms.InterpolationMode.BICUBIC and resize.max_size is None
    if not plain or tuple(crop.size) != (side, side):
        return None

    def box(height: int, width: int) -> Box | None:
        if len(size) == 1:
            short, long = sorted((height, width))
            longer = int(size[0] * long / short)
            height, width = (size[0], longer) if height <= width else (longer, size[0])
        else:
            height, width = size
        if min(height, width) < side:
            return None  # would be padded
        return height, width, round((height - side) / 2.0), round((width - side) / 2.0)

    def run(pixels: NDArray[np.uint8], some: Sequence[Any]) -> torch.Tensor:
        found: Any = Image.fromarray(pixels)
        for step in some:
            found = step(found)
        made: torch.Tensor = found
        return made

    table = run(every_byte(), rest)[:, 0]
    return Preprocessing(lambda image: run(image, steps), side, box, table, device)


EACH_PIXEL = ("MaybeConvertMode", "MaybeToTensor", "ToTensor", "Normalize", "_convert_to_rgb", "function")


def every_byte() -> NDArray[np.uint8]:
    """An image (1, 256, 3) of every byte in every channel."""
    return np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
