"""Init images of img2img: found for each prompt, read, and told apart by their content."""

from __future__ import annotations

import hashlib
import io
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from lesion.errors import RequestError
from lesion.study.prompts import Prompt, slug_of_0_1

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # others may start programs (.eps: Ghostscript)
LARGEST = 256 << 20  # bytes of a file
MENDED = b"\0read 2"  # told apart from what version 0.1 made of the same file


def with_inits(prompts: Sequence[Prompt], init: str | None, key: str) -> tuple[Prompt, ...]:
    """The prompts with the path and identity of their init images.

    init: one image for all, or a folder that holds one named by the id of each prompt; a prompt's own `image` comes
    first. Raises RequestError where there is none, or one that cannot be read.
    """
    digests: dict[Path, str] = {}
    found = []
    for prompt in prompts:
        path = _init_of(prompt, init, key)
        if path not in digests:
            try:
                _, digests[path] = read_init(path)
            except ValueError as error:
                raise RequestError(key, f"{str(path)!r} is no image that can be read: {error}") from None
        found.append(replace(prompt, image=str(path.absolute()), digest=digests[path]))
    return tuple(found)


def read_init(path: Path) -> tuple[Image.Image, str]:
    """An init image in RGB as diffusers' `load_image` reads it, and its identity, 64 hex digits.

    16-bit grey is scaled to 8 bits (`load_image` clips it to white). The identity is the SHA-256 of the file. Version
    0.1 read pictures that EXIF turns and 16-bit grey wrongly: theirs is the SHA-256 of the file and `MENDED`, so that
    images made from the wrong pixels do not count. Raises ValueError for what is no regular file of `FORMATS`,
    is damaged, has more bytes than `LARGEST`, or more pixels than Pillow's limit against decompression bombs.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                # The orientation; of TIFF Pillow applies it by itself.
                mended = opened.getexif().get(0x0112, 1) in range(2, 9) and opened.format != "TIFF"
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG"):
                    image, mended = _eight_bits(image), True
                elif image.mode in ("I", "F"):
                    raise ValueError("it has 32 bits a pixel; allowed: 8 or 16")
                picture = image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"allowed: {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many kinds; each means that the picture cannot be had
        raise ValueError(str(error) or type(error).__name__) from None
    return picture, hashlib.sha256(content + (MENDED if mended else b"")).hexdigest()


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    return Image.fromarray(((np.asarray(image, np.int64) * 255 + 32767) // 65535).astype(np.uint8))


def _init_of(prompt: Prompt, init: str | None, key: str) -> Path:
    if prompt.image:
        return Path(prompt.image).expanduser()
    if not init:
        raise RequestError(
            key, f"prompt {prompt.id!r} has no init image: give generation.init (a file or folder) or a column `image`"
        )
    path = Path(init).expanduser()
    if not path.is_dir():
        return path
    named: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        named.setdefault(unicodedata.normalize("NFC", file.stem), []).append(file)
    fitting = named.get(prompt.id) or named.get(slug_of_0_1(prompt.text), [])
    if len(fitting) != 1:
        number = "no image" if not fitting else f"{len(fitting)} images"
        raise RequestError(key, f"folder {init!r} has {number} named {prompt.id!r}.*; needs one for each prompt id")
    return fitting[0]
