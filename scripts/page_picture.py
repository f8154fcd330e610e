"""Makes the README's picture of the page: a screenshot by headless Chromium, in few colours so that it is small.

    python scripts/page_picture.py outputs/DATE/TIME/report.html docs/images/page.png

The run behind docs/images/page.png is `make demo`. Needs Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1280, 1230  # px of the window
COLOURS = 128


def shoot(page: Path, target: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write the top of a page as a PNG of COLOURS colours. Raises SystemExit where there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("no chromium on the path")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        picture = Path(folder) / "page.png"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        flags += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=4000", f"--screenshot={picture}"]
        subprocess.run([program, *flags, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(picture) as shot:
            shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    shoot(arguments.page, arguments.target)
