"""Trains a LoRA on a folder of captioned images, for any Stable Diffusion 1.x, 2.x or XL.

    python scripts/train_lora.py photos --model runwayml/stable-diffusion-v1-5 --out build/my_lora --steps 1000
    python scripts/train_lora.py photos --out build/tiny_lora --validation-prompt "a teal star"    the embedded model
    accelerate launch scripts/train_lora.py …                                        several GPUs

The folder has `metadata.csv` or `metadata.jsonl` (file_name, text), or NAME.txt beside NAME.png. Only the low-rank
matrices on the attention's projections are trained. The same command again goes on from the last checkpoint; the batch
of a step depends on its number only, so an interrupted run ends with the same weights. The result,
pytorch_lora_weights.safetensors, is loaded by `pipe.load_lora_weights(FOLDER)` and by `model.loras` of a study.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lesion.errors import RequestError
from lora.data import BadFolder, digest, read_folder
from lora.recipe import PRECISIONS, SCHEDULES, TARGETS, Recipe, Refused
from lora.training import WEIGHTS, Paused, Watch, train


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("folder", type=Path, help="captioned images")
    out.add_argument("--out", type=Path, required=True, help="run folder: the LoRA, checkpoint, validation images")
    model = out.add_argument_group("model")
    model.add_argument("--model", default="embedded", help="embedded, a folder, a hub name or a .safetensors file")
    model.add_argument("--pipeline", help="of a single file: its class, e.g. StableDiffusionXLPipeline")
    model.add_argument("--config", help="of a single file: folder or hub name with its configs")
    model.add_argument("--revision", help="of a hub name")
    model.add_argument("--variant", help="of the weight files, e.g. fp16")
    adapter = out.add_argument_group("adapter")
    adapter.add_argument("--rank", type=_at_least(1), default=8)
    adapter.add_argument("--alpha", type=float, help="scale: the adapter counts alpha / rank (default: the rank)")
    adapter.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="NAME", help="ends of module paths")
    run = out.add_argument_group("training")
    run.add_argument("--steps", type=_at_least(1), default=1000, help="optimizer steps")
    run.add_argument("--batch", type=_at_least(1), default=4, help="images at once, in each process")
    run.add_argument("--accumulate", type=_at_least(1), default=1, help="batches a step")
    run.add_argument("--rate", type=float, default=1e-4, help="learning rate at its peak")
    run.add_argument("--warmup", type=_at_least(0), default=0, help="steps up to the peak")
    run.add_argument("--schedule", choices=SCHEDULES, default="constant")
    run.add_argument("--decay", type=float, default=1e-2, help="weight decay")
    run.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    run.add_argument("--dropout", type=_share, default=0.0, help="share of captions replaced by the empty one")
    run.add_argument("--flip", action="store_true", help="mirror half of the images")
    run.add_argument("--resolution", type=_at_least(8), help="pixels (default: the model's own)")
    run.add_argument("--seed", type=_at_least(0), default=0)
    run.add_argument("--mixed-precision", choices=tuple(PRECISIONS), default="no")
    run.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--save-every", type=_at_least(1), default=500, help="steps between checkpoints")
    run.add_argument("--minutes", type=float, default=1e9, help="pause after so many minutes")
    watch = out.add_argument_group("validation images")
    watch.add_argument("--validation-prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    watch.add_argument("--validate-every", type=_at_least(1), default=100, help="steps between validation images")
    watch.add_argument("--validation-seed", type=int, default=0, help="of the first image; the next has one more")
    watch.add_argument("--validation-steps", type=_at_least(1), default=20, help="denoising steps")
    watch.add_argument("--validation-guidance", type=float, default=5.0)
    return out


def _at_least(low: int):  # type: ignore[no-untyped-def]
    def whole_number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}; got {text}")
        return int(text)

    return whole_number


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1]; got {text}")
    return float(text)


def main(arguments: list[str] | None = None) -> None:
    command = parser()
    args = command.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        command.error("argument --device: there is no CUDA device here; allowed: auto, cpu")
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    if cpu and args.mixed_precision == "fp16":
        command.error("argument --mixed-precision: fp16 needs a GPU; allowed: no, bf16")
    try:
        examples = read_folder(args.folder)
    except BadFolder as error:
        command.error(f"argument folder: {error}")
    recipe = Recipe(
        model=args.model,
        data=digest(examples),
        pipeline=args.pipeline,
        config=args.config,
        revision=args.revision,
        variant=args.variant,
        rank=args.rank,
        alpha=args.rank if args.alpha is None else args.alpha,
        targets=tuple(args.targets),
        steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        rate=args.rate,
        warmup=args.warmup,
        schedule=args.schedule,
        decay=args.decay,
        clip=args.clip,
        seed=args.seed,
        side=args.resolution,
        flip=args.flip,
        dropout=args.dropout,
        precision=args.mixed_precision,
    )
    watch = Watch(
        save_every=args.save_every,
        show_every=args.validate_every if args.validation_prompt else 0,
        prompts=tuple(args.validation_prompt),
        seed=args.validation_seed,
        steps=args.validation_steps,
        guidance=args.validation_guidance,
        until=time.monotonic() + 60 * args.minutes,
        checkpointing=args.gradient_checkpointing,
    )
    try:
        losses = train(recipe, examples, args.out, watch, cpu)
    except Paused as pause:
        print(f"{pause}; run the same command again to resume")
        return
    except (Refused, RequestError) as error:
        command.error(str(error))
    print(f"{len(losses)} steps on {len(examples)} images, written to {args.out / WEIGHTS}")


if __name__ == "__main__":
    main()
