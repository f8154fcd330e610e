"""The console script `lesion-inspect`: what a model is made of, and which of its layers can be lesioned.

    lesion-inspect model=embedded                         the layers of the denoiser and the tree of its modules
    lesion-inspect model=local model.id=FOLDER depth=2    deeper
    lesion-inspect model=embedded component=text_encoder  another component, with its layers
    lesion-inspect model=embedded "prompt=a red circle"   the text tokens of a prompt, for layers.by=token
    lesion-inspect model=embedded by=head kind=self_attention   layers of another granularity and kind

Builds the component on the meta device from its config: no weight is loaded.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from lesion import models
from lesion.cli import in_utf8, say, unforeseen
from lesion.config.compose import one_line
from lesion.config.schema import conf_dir, register
from lesion.errors import RequestError, visible
from lesion.models import components
from lesion.study import tokens
from lesion.study.checks import digits, one_of
from lesion.study.components import DENOISER
from lesion.study.components import GRANULARITIES as GRANULARITIES_OF
from lesion.study.components import KINDS as KINDS_OF
from lesion.study.layers import GRANULARITIES, KINDS, WITH_HEADS
from lesion.surgery.anatomy import PLACES, AnatomyError, attentions_of, examine, kinds_of
from lesion.surgery.components import examine_component

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def tree(module: nn.Module, depth: int, name: str = "", indent: int = 0) -> Iterator[str]:
    """The module and its children as indented lines, `depth` levels deep.

    Containers show their length, leaves their own parameters as torch prints them.
    """
    label = f"{name}: " if name else ""
    children = list(module.named_children())
    if isinstance(module, CONTAINERS):
        text = f"{type(module).__name__} of {len(children)}"
    elif children:
        text = f"{type(module).__name__} ({_millions(module)})"
    else:
        text = repr(module).splitlines()[0]
    yield "  " * indent + label + text
    if depth > 0:
        for child_name, child in children:
            yield from tree(child, depth - 1, child_name, indent + 1)


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"


def layer_lines(denoiser: nn.Module, by: str = "attention", kind: str = "") -> list[str]:
    """A table of the layers that can be lesioned, in forward order, and the kinds of sites that there are.

    kind: by default the first of `anatomy.kinds_of`. Raises AnatomyError where there are none.
    """
    kinds = kinds_of(denoiser)
    layers = examine(denoiser, by, kind or next(iter(kinds), "cross_attention")).layers
    width = max(len(layer.path) for layer in layers)
    lines = [
        f"{'layer':{width}}  place  side  channels  heads  head dim  text dim  sites",
        f"{'-' * width}  -----  ----  --------  -----  --------  --------  -----",
    ]
    for layer in layers:
        site = layer.sites[0]
        lines.append(
            f"{layer.path:{width}}  {layer.place:5}  {layer.resolution or '?':>4}  {site.channels:8}  {site.heads:5}  "
            f"{site.head_dim:8}  {site.text_dim:8}  {len(layer.sites):5}"
        )
    number = sum(len(layer.sites) for layer in layers)
    lines.append(f"{len(layers)} layers, {number} sites (side: of the feature map, in latent pixels)")
    counts = {kind: len(examine(denoiser, kind=kind).by_path) for kind in kinds}
    heads = sum(len(examine(denoiser, "head", kind).layers) for kind in kinds if kind in WITH_HEADS)
    lines.append(f"sites by kind: {', '.join(f'{kind} {count}' for kind, count in counts.items())}; {heads} heads")
    return lines


def component_lines(source: models.Source, component: str, module: nn.Module, by: str, kind: str) -> list[str]:
    """A table of the layers of a text encoder or of the decoder that can be lesioned, in forward order.

    kind: by default `block`. Where the class is not known, a line that says so.
    """
    allowed = components.kinds(source, component)
    if not allowed:
        name = source.components[component][1]
        return [f"no layers to lesion: {component} is a {name}; known are {', '.join(components.KNOWN[component])}"]
    for key, given, known in (("by", by, GRANULARITIES_OF[component]), ("kind", kind or "block", allowed)):
        one_of(key, given, [one for one in known if one not in tokens.BY])
    layers = examine_component(component, module, by, kind or "block").layers
    width = max(len(layer.path) for layer in layers)
    lines = [f"{'layer':{width}}  sites  first module", f"{'-' * width}  -----  ------------"]
    for layer in layers:
        lines.append(f"{layer.path:{width}}  {len(layer.sites):5}  {component}.{layer.sites[0].hook.module}")
    counts = {one: len(examine_component(component, module, "attention", one).by_path) for one in allowed}
    lines.append(f"{len(layers)} layers, {sum(len(layer.sites) for layer in layers)} sites")
    lines.append(f"sites by kind: {', '.join(f'{one} {count}' for one, count in counts.items())}")
    return lines


def token_lines(source: models.Source, prompt: str) -> list[str]:
    """Where the words of a prompt, and what the tokenizers put around it, are among the text tokens (layers.by=token).

    Raises RequestError for a pipeline whose words cannot be told apart.
    """
    from lesion.models.words import words_of

    try:
        words = words_of(_tokenizing(source), prompt)
    except ValueError as error:
        raise RequestError("prompt", str(error)) from None
    named = {name: getattr(words, name) for name in ("begin", "end", "padding")} | {
        f"word:{name}": columns for name, columns in words.columns.items()
    }
    rows = sorted((columns, name) for name, columns in named.items() if columns)
    width = max(len(name) for _, name in rows)
    lines = [f"{words.length} text tokens", f"{'layers.tokens':{width}}  position", f"{'-' * width}  --------"]
    lines += [f"{name:{width}}  {', '.join(_spans(columns))}" for columns, name in rows]
    return [*lines, *([f"beyond the limit: {', '.join(words.unseen)}"] if words.unseen else [])]


def _tokenizing(source: models.Source) -> Any:
    """What a pipeline is to `models.words`: its class's call and its tokenizers, without any weight."""
    import transformers

    cls = models.source.pipeline_class(source.pipeline)
    pipe = type(source.pipeline, (), {"__call__": cls.__call__})()
    for name, (library, kind) in source.components.items():
        if name.startswith("tokenizer") and library == "transformers":
            setattr(pipe, name, getattr(transformers, kind).from_pretrained(source.folder / name))
        elif name.startswith("text_encoder"):
            setattr(pipe, name, kind)
    for name in ("text_encoder_3", "tokenizer_3"):
        pipe.__dict__.setdefault(name, None)
    if hasattr(pipe, "tokenizer"):
        pipe.tokenizer_max_length = pipe.tokenizer.model_max_length
    return pipe


def _spans(numbers: Iterable[int]) -> Iterator[str]:
    """Rising whole numbers as text, neighbours as 5-7."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        found = [number for _, number in group]
        yield f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])


def processor_lines(denoiser: nn.Module) -> list[str]:
    """Each attention processor with its kind and place, and their number by kind, name and place."""
    processors = getattr(denoiser, "attn_processors", {})
    known, names = attentions_of(denoiser), {"joint_attention": "joint attention"}
    lines: list[str] = []
    counts: dict[str, dict[str, int]] = {}
    for path, processor in processors.items():
        path = path.removesuffix(".processor")
        kind = known.get(path, "other attention")
        words = names.get(kind, kind.replace("_", "-"))
        place, leaf = path.split("_")[0], path.rpartition(".")[2]
        places = counts.setdefault(f"{words} {leaf}", dict.fromkeys(PLACES, 0))
        if place in places:
            places[place] += 1
        else:
            places[""] = places.get("", 0) + 1
        lines.append(f"  {path}  {words}  {type(processor).__name__}")
    parts = []
    for name, places in sorted(counts.items(), key=lambda item: item[0].rpartition(" ")[2]):
        where = ", ".join(f"{place} {number}" for place, number in places.items() if place)
        parts.append(f"{sum(places.values())} {name}" + (f" ({where})" if "" not in places else ""))
    return [f"{len(processors)} attention processors: {', '.join(parts)}", *lines]


def report(arguments: list[str]) -> list[str]:
    """All lines for these overrides; `component` (default: the denoiser), `depth` (default 1) and `processors`;
    `by` and `kind` of the layers that are listed; a `prompt` whose tokens are.
    """
    wanted = {"component": "", "depth": "1", "processors": "false", "by": "attention", "kind": "", "prompt": ""}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in wanted:
            wanted[key] = value.strip("'\"") if key == "prompt" else value
        elif key.startswith("model"):
            overrides.append(argument)
        else:
            raise RequestError(key, f"unknown; allowed: model, model.*, {', '.join(wanted)}")
    if digits(wanted["depth"]) is None:
        raise RequestError("depth", f"must be a whole number >= 0; got {wanted['depth'][:80]!r}")
    if wanted["processors"] not in ("true", "false"):
        raise RequestError("processors", f"got {wanted['processors']!r}; allowed: true, false")
    for key, allowed in {"by": GRANULARITIES, "kind": ("", *KINDS)}.items():
        if wanted[key] not in allowed:
            raise RequestError(key, f"got {wanted[key]!r}; allowed: {', '.join(filter(None, allowed))}")
    register(conf_dir())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        conf = compose("lesion", overrides).model
    if missing := OmegaConf.missing_keys(conf):
        raise RequestError(f"model.{min(missing)}", "has no value; give one")
    source = models.resolve(models.ModelSpec.of(conf, {}))
    component = source.denoiser if wanted["component"] in ("", DENOISER) else wanted["component"]
    module = source.skeleton(component)
    lines = [f"{conf.name}: {source.index.get('_class_name', 'pipeline')} with {', '.join(source.components)}", ""]
    if component == source.denoiser:
        lines += [*layer_lines(module, wanted["by"], wanted["kind"]), ""]
        shown = processor_lines(module)
        lines += [*(shown if wanted["processors"] == "true" else shown[:1]), ""]
    elif component in KINDS_OF:
        lines += [*component_lines(source, component, module, wanted["by"], wanted["kind"]), ""]
    if wanted["prompt"]:
        lines += [*token_lines(source, wanted["prompt"]), ""]
    return [*lines, *tree(module, int(wanted["depth"]), component)]


def main() -> None:
    in_utf8()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        print("\n".join(map(visible, report(sys.argv[1:]))))
    except (RequestError, AnatomyError, HydraException, OmegaConfBaseException) as error:
        say("lesion-inspect", one_line(error))
        sys.exit(2)
    except Exception as error:
        sys.exit(unforeseen("lesion-inspect", error, 2))


if __name__ == "__main__":
    main()
