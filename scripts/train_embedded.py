"""Trains the embedded model and its CLIP from nothing, stage by stage.

    python scripts/train_embedded.py                     every stage, on the GPU if there is one
    python scripts/train_embedded.py unet --minutes 30   one stage for half an hour; call again to go on

Each stage keeps its checkpoint in the run folder (default build/embedded) and is skipped once complete. The last
stage, `export`, writes the finished folders into the package. Every random draw comes from a fixed seed, and the batch
of a step depends on the step number only, so a resumed run sees the same data as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from embedded import clip, export, text, unet, vae
from embedded.common import Paused, Run
from lesion.models import EMBEDDED

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "vae": vae.train,
    "tokenizer": text.train_tokenizer,
    "text": text.train,
    "unet": unet.train,
    "clip": clip.train,
    "export": export.export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all, in order)")
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "embedded", help="run folder")
    parser.add_argument("--into", type=Path, default=EMBEDDED, help="where `export` puts the finished model")
    parser.add_argument("--start-from", type=Path, help="a finished model to train further, into a new run folder")
    parser.add_argument("--minutes", type=float, default=1e9, help="pause after so many minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three steps of everything: tests the script, not a model")
    args = parser.parse_args()
    if unknown := [stage for stage in args.stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}; choose from {', '.join(STAGES)}")
    args.run.mkdir(parents=True, exist_ok=True)
    run = Run(args.run, args.into, torch.device(args.device), time.monotonic() + 60 * args.minutes, args.quick)
    if args.start_from and not any(args.run.iterdir()):
        export.start_from(args.start_from, run)
    for name in args.stages or STAGES:
        if (run.folder / f"{name}.done").exists():
            print(f"{name}: already complete in {run.folder}")
            continue
        began = time.monotonic()
        try:
            STAGES[name](run)
        except Paused as pause:
            print(f"{pause}; run the same command again to resume")
            return
        finally:
            with (run.folder / "times.txt").open("a", encoding="utf-8") as log:
                log.write(
                    f"{name} {time.monotonic() - began:.0f} s on {run.device} ({torch.get_num_threads()} threads)\n"
                )
        (run.folder / f"{name}.done").touch()


if __name__ == "__main__":
    main()
