"""A wheel holds the configs and the model, and works outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_wheel_runs_on_its_own(tmp_path):
    """Built, unpacked like an installer does, and run from another folder with nothing of the checkout on the path."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "lesion/conf/lesion.yaml" in names
    assert "lesion/models/embedded/unet/diffusion_pytorch_model.safetensors" in names
    assert "lesion/models/embedded/clip/open_clip_model.safetensors" in names
    assert any(name.startswith("lesion/report/templates/") for name in names)
    assert _scripts(site)["lesion"] == "lesion.cli.study:main"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import lesion.cli.study as c; print(c.__file__); c.main()"
    work = tmp_path / "work"
    work.mkdir()
    out = subprocess.run(
        [sys.executable, "-c", code, "debug=smoke"], cwd=work, check=True, capture_output=True, text=True
    ).stdout
    assert str(site) in out.splitlines()[0]
    assert "up_blocks.3.attentions.2" in out
    assert list(work.rglob("results.parquet"))


def _scripts(site: Path) -> dict[str, str]:
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    pairs = [line.split(" = ") for line in entry.read_text().splitlines() if " = " in line]
    return dict(pairs)  # type: ignore[arg-type]
