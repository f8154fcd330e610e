"""The columns of results.parquet, each declared once: how a cell has it, and what it means for comparing runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lesion.study import boxes
from lesion.study.components import TEXT, component_of, components_of
from lesion.study.grid import Cell
from lesion.study.lesions import NOWHERE, Lesion
from lesion.study.settings import DECLARED, Declaration
from lesion.study.steering import STEERING_OFF, within
from lesion.study.tokens import layer_and_set

MADE_WITH = ("card", "torch", "diffusers", "lesion")  # what made an image; not part of its identity
COMPONENT = "component"  # in which lesions are, in results with such outside the denoiser
TRUNCATED = "truncated_tokens"  # of the prompt, that no text encoder of the model sees; missing where not known
Of = Callable[[Cell, Sequence[str]], Any]


@dataclass(frozen=True)
class Column:
    """One column.

    of: its value for a cell of a model with these layers, in forward order; None where it comes of making and scoring.
    about: `lesion` or `generation`, if images with different values are settings of their own, never averaged together;
        `identity`, if runs must agree in it to be compared at all; `several`, if it tells lesions of several layers
        apart; else "".
    needed: results without it are not read.
    text: a missing value is "".
    earlier: what results of earlier versions, which lack it, get; None if every version has it.
    """

    name: str
    of: Of | None = None
    about: str = ""
    needed: bool = False
    text: bool = False
    earlier: Any = None


def _of_lesion(of: Callable[[Lesion], Any], baseline: Any) -> Of:
    return lambda cell, layers: of(cell.lesion) if cell.lesion else baseline


def _lesioned(cell: Cell, layers: Sequence[str]) -> str:
    """The lesioned layers where `layer` does not name them, and in every step of a sequence."""
    lesion = cell.lesion
    if lesion is None or (lesion.place == NOWHERE and lesion.layer and not {lesion.layer} < set(lesion.layers)):
        return ""
    return "+".join(lesion.layers)


def _layer_index(cell: Cell, layers: Sequence[str]) -> int:
    """Among the layers of its component, so that a study of several has the indices of one of each."""
    if not cell.lesion or not cell.lesion.layer:
        return -1
    mine = component_of(cell.lesion.layer)
    first = next(place for place, layer in enumerate(layers) if component_of(layer) == mine)
    return layers.index(cell.lesion.layer) - first


def kinds(lesion: Lesion) -> str:
    """Which modules a lesion touches; those of several components joined by "+" where they differ.

    Text tokens of an encoder are lesioned in its self-attention, whatever the denoiser's kind is.
    """
    by_token = any(layer_and_set(layer)[1] for layer in lesion.layers)
    found = ["self_attention" if by_token and one in TEXT else lesion.kind for one in components_of(lesion.layers)]
    return "+".join(dict.fromkeys(found))


def component(cell: Cell) -> str:
    """The components that a cell's lesion is in, joined by "+"; "" for the baseline."""
    return "+".join(components_of(cell.lesion.layers)) if cell.lesion else ""


def _steering(cell: Cell, what: str) -> str:
    return str(getattr(cell.settings.steering, what)) if cell.settings.steering else ""


def steering_layers(cell: Cell) -> tuple[str, ...]:
    """The layers whose maps steer the image, without those that a lesion takes out of the loss."""
    if cell.settings.steering is None:
        return ()
    lesion = cell.lesion
    off = lesion.layers if lesion and lesion.replacement.name == STEERING_OFF and lesion.strength == 1 else ()
    return tuple(path for path in cell.settings.steering.layers if not any(within(path, out) for out in off))


def _of_setting(declared: Declaration) -> Column:
    name = declared.name
    return Column(
        str(declared.column),
        lambda cell, layers: declared.shown(getattr(cell.settings, name)),
        about="generation" if declared.compared else "",
        earlier=None if declared.always else declared.shown(declared.default),
    )


COLUMNS: tuple[Column, ...] = (
    Column("model", lambda cell, layers: cell.model.name, needed=True),
    Column("prompt_id", lambda cell, layers: cell.prompt.id, needed=True),
    Column("prompt", lambda cell, layers: cell.prompt.text, needed=True, text=True),
    Column("aspects", lambda cell, layers: ",".join(cell.prompt.aspects), text=True, earlier=""),
    Column("init", lambda cell, layers: PurePath(cell.prompt.image).name, text=True, earlier=""),
    Column("seed", lambda cell, layers: cell.seed, needed=True),
    Column("selection", _of_lesion(lambda lesion: lesion.selection, "none"), needed=True),
    Column("kind", _of_lesion(kinds, ""), "lesion", text=True, earlier=Lesion.kind),
    Column("replacement", _of_lesion(lambda lesion: lesion.replacement.name, ""), "lesion", needed=True, text=True),
    Column("layer", _of_lesion(lambda lesion: lesion.layer, ""), needed=True, text=True),
    Column("lesioned", _lesioned, "several", text=True, earlier=""),
    Column("order", _of_lesion(lambda lesion: lesion.place.order, NOWHERE.order), "several"),
    Column("permutation", _of_lesion(lambda lesion: lesion.place.permutation, NOWHERE.permutation), "several"),
    Column("position", _of_lesion(lambda lesion: lesion.place.position, NOWHERE.position)),
    Column("layer_index", _layer_index, needed=True),
    Column("window_start", _of_lesion(lambda lesion: lesion.window[0], Lesion.window[0]), "lesion", needed=True),
    Column("window_end", _of_lesion(lambda lesion: lesion.window[1], Lesion.window[1]), "lesion", needed=True),
    Column("branch", _of_lesion(lambda lesion: lesion.branch, Lesion.branch), "lesion", needed=True),
    Column("strength", _of_lesion(lambda lesion: lesion.strength, 0.0), "lesion", needed=True),
    *(_of_setting(declared) for declared in DECLARED if declared.column),
    Column("steering", lambda cell, layers: _steering(cell, "name"), "generation", text=True, earlier=""),
    Column("steering_settings", lambda cell, layers: _steering(cell, "digest"), "generation", text=True, earlier=""),
    Column("boxes", lambda cell, layers: boxes.as_text(cell.prompt.boxes), text=True, earlier=""),
    Column("steering_layers", lambda cell, layers: "+".join(steering_layers(cell)), text=True, earlier=""),
    Column("dtype", lambda cell, layers: cell.model.dtype, "identity"),
    Column("device", lambda cell, layers: cell.model.device, "identity"),
    Column("fingerprint", lambda cell, layers: cell.model.fingerprint, "identity"),
    *(Column(name, text=True, earlier="") for name in MADE_WITH),
    Column(TRUNCATED),
    Column("cell", lambda cell, layers: cell.key, needed=True),
    Column("status", needed=True),
    Column("reason", needed=True, text=True),
    Column("image", needed=True, text=True),
    Column("clip_similarity", needed=True),
    Column("scorer_identity", about="identity"),
    Column("importance_metric", about="identity"),
    Column("protocol", about="identity"),
)


def _about(what: str) -> tuple[str, ...]:
    return tuple(column.name for column in COLUMNS if column.about == what)


# Of shards only, in results and floor; they are gone once shards are put together.
WHOLE, PLACE = "study", "study_row"  # digest of the whole study; place of the row among its rows, from 0
LESION, GENERATION, IDENTITY, SEVERAL = map(_about, ("lesion", "generation", "identity", "several"))
NEEDED = tuple(column.name for column in COLUMNS if column.needed)
TEXTS = tuple(column.name for column in COLUMNS if column.text)
EARLIER = {column.name: column.earlier for column in COLUMNS if column.earlier is not None}
# Of the model, what pixels depend on.
MADE = tuple(column.name for column in COLUMNS if column.about == "identity" and column.of)


def row(cell: Cell, layers: Sequence[str]) -> dict[str, Any]:
    """The cell's own columns of the results: what was asked, not what came of it.

    layers: every layer of the model in forward order.
    """
    return {column.name: column.of(cell, layers) for column in COLUMNS if column.of}
