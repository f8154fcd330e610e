"""The schema of a request: names and types of every key, as Hydra checks them. The values are in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from lesion import replacements
from lesion.study.components import DENOISER
from lesion.study.lesions import SELECTIONS, Lesion
from lesion.study.settings import DECLARED, Declaration

Truth = Any  # true or false, read by `reading`: OmegaConf takes any number but 0 for true


def _free() -> Any:
    """An empty mapping that takes any key from the command line; elsewhere Hydra refuses keys that are not there."""
    return DictConfig({}, key_type=str, element_type=Any, flags={"struct": False})


@dataclass
class ModelConf:
    name: str = MISSING
    id: str = MISSING
    pipeline: str | None = None
    config: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: str = "auto"
    scheduler: str | None = None
    loras: list[Any] = field(default_factory=list)
    vae: str | None = None
    arguments: dict[str, Any] = field(default_factory=_free)
    offload: str = "none"
    vae_slicing: Truth = False
    vae_tiling: Truth = False
    kind: str = Lesion.kind
    steps: int | None = MISSING
    guidance: float | None = MISSING
    height: int | None = MISSING
    width: int | None = MISSING
    batch_size: Any = MISSING


@dataclass
class PromptsConf:
    name: str = MISSING
    items: list[Any] = field(default_factory=list)
    path: str | None = None
    format: str | None = None
    column: str | None = None
    id_column: str | None = None
    aspects_column: Any = None
    where: str | None = None
    sample: int | None = None
    sample_seed: int = 0
    limit: int | None = None


@dataclass
class LayersConf:
    component: Any = DENOISER
    by: str = "attention"
    tokens: Any = None
    kind: str = Lesion.kind
    include: Any = None
    exclude: Any = None


def _key(declared: Declaration) -> tuple[str, Any, Any]:
    """Name, type and default; a value that the schema's type does not have (null for a number) is none."""
    given = declared.asked is None and declared.default is not ...
    return str(declared.key), declared.asked or declared.type, field(default=declared.default if given else MISSING)


# What is asked of generation beside its settings: where the init images of img2img lie.
GenerationConf = make_dataclass(
    "GenerationConf",
    [*(_key(declared) for declared in DECLARED if declared.key is not None), ("init", str | None, field(default=None))],
)


@dataclass
class PerformanceConf:
    dtype: str = MISSING
    compile: Truth = False
    channels_last: Truth = False
    tf32: Truth = False
    shared_rows: Truth = False
    decoder: str | None = None


@dataclass
class ScorerConf:
    name: str = MISSING
    clip_model: str = MISSING
    clip_pretrained: str | None = None
    metrics: Any = MISSING
    importance: str = "clip_similarity"
    dino_model: str = "facebook/dinov2-base"
    batch_size: int = 64


@dataclass
class CaptureConf:
    name: str = "none"
    layers: Any = None
    steps: Any = field(default_factory=lambda: [0.0, 1.0])
    branch: str = "cond"
    heads: str = "mean"
    reduce: str = "mean"
    tokens: str = "prompt"


@dataclass
class SteeringConf:
    name: str = "none"
    layers: Any = None
    scale: Any = None
    threshold: Any = None
    iterations: Any = None
    steps: Any = None
    step_size: Any = None
    mask: Any = None
    checkpointing: Any = False


@dataclass
class AttributionConf:
    name: str = "none"
    top: Any = 10
    sample: Any = 10
    candidates: Any = 0
    threshold: Any = None
    view: str = "clip"
    signed: Any = None
    probes: Any = 4
    points: Any = 0.0
    mean: str = "root"
    seed: Any = 0
    checkpointing: Truth = False


@dataclass
class BudgetConf:
    ci_halfwidth: Any = None
    max_images: Any = None
    start: Any = 20
    round: Any = 6


@dataclass
class ConfirmConf:
    hypotheses: Any = field(default_factory=list)
    layers: Any = 1
    alpha: Any = 0.05
    paraphrases: Any = None


@dataclass
class ShardConf:
    count: int = 1
    index: int = 0


@dataclass
class StoreConf:
    dir: str = MISSING
    check: Truth = False


@dataclass
class LesionConf:
    """A whole request."""

    model: ModelConf = field(default_factory=ModelConf)
    models: dict[str, Any] = field(default_factory=_free)
    prompts: PromptsConf = field(default_factory=PromptsConf)
    seeds: Any = MISSING
    layers: LayersConf = field(default_factory=LayersConf)
    selection: dict[str, Any] = field(default_factory=dict)
    replacement: dict[str, Any] = field(default_factory=dict)
    window: Any = MISSING
    branch: Any = MISSING
    strength: Any = MISSING
    generation: GenerationConf = field(default_factory=GenerationConf)  # type: ignore[valid-type]
    performance: PerformanceConf = field(default_factory=PerformanceConf)
    scorer: ScorerConf = field(default_factory=ScorerConf)
    capture: CaptureConf = field(default_factory=CaptureConf)
    steering: SteeringConf = field(default_factory=SteeringConf)
    attribution: AttributionConf = field(default_factory=AttributionConf)
    tracker: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    budget: BudgetConf = field(default_factory=BudgetConf)
    confirm: ConfirmConf = field(default_factory=ConfirmConf)
    shard: ShardConf = field(default_factory=ShardConf)
    store: StoreConf = field(default_factory=StoreConf)
    device: str = MISSING
    workers: int = MISSING
    dry_run: Truth = False


def conf_dir() -> Path:
    """conf/ of the checkout, or its copy inside an installed wheel."""
    package = Path(__file__).parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


def register(conf: Path) -> None:
    """Make the schema known to Hydra, and selections and replacements that need no file of options of their own."""
    store = ConfigStore.instance()
    known = store.repo.get("schema.yaml")  # of another application too
    if known is None or OmegaConf.get_type(known.node) is not LesionConf:
        store.store(name="schema", node=LesionConf)
    for group, names in {"selection": SELECTIONS, "replacement": replacements.known()}.items():
        for name in names:
            if not (conf / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node={name: {}})
