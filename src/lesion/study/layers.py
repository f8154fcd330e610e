"""Which layers are under study, as a request says it. What the words mean is in `lesion.surgery.anatomy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lesion.errors import RequestError
from lesion.study import layer_patterns, tokens
from lesion.study.checks import distinct, one_of
from lesion.study.components import DENOISER, parse_components

KINDS = (
    *("cross_attention", "self_attention", "joint_attention", "text_to_image", "feed_forward", "block"),
    "text_stream",
)
GRANULARITIES = ("attention", "transformer_block", "block", "stage", "head")
ALL_BY = (*GRANULARITIES, *tokens.BY)
WITH_HEADS = ("cross_attention", "self_attention", "joint_attention")  # kinds that `by=head` can take apart


@dataclass(frozen=True)
class Layers:
    """by: how modules are grouped to layers. kind: which modules of a layer are lesioned.

    include, exclude: patterns of layer paths, a glob or `re:` and a regular expression; None for all and for none.
    components: whose layers, in the order in which an image passes them.
    tokens: with by=token or attention_token the sets of text tokens that layers are made of; else none.
    """

    by: str
    kind: str
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    components: tuple[str, ...] = (DENOISER,)
    tokens: tuple[str, ...] = ()

    def whole(self, component: str) -> str:
        """The component where each set of tokens is lesioned in all of its layers; "" where in each of them."""
        return component if self.by == tokens.EVERYWHERE else ""

    @property
    def grouping(self) -> str:
        """How modules are grouped before tokens are told apart."""
        return "attention" if self.tokens else self.by

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layers:
        """From the `layers` group of a request. Raises RequestError naming the key and what is allowed."""
        by, kind = one_of("layers.by", config["by"], ALL_BY), one_of("layers.kind", config["kind"], KINDS)
        if by == "head" and kind not in WITH_HEADS:
            raise RequestError(
                "layers.by", f"{kind} has no attention heads; with head: layers.kind={', '.join(WITH_HEADS)}"
            )
        if by in tokens.BY and kind not in tokens.KINDS:
            raise RequestError("layers.kind", f"got {kind}; allowed with layers.by={by}: {', '.join(tokens.KINDS)}")
        if by not in tokens.BY and config.get("tokens") is not None:
            raise RequestError(tokens.KEY, f"needs layers.by={' or '.join(tokens.BY)}; allowed with {by}: null")
        include, exclude = (_patterns(f"layers.{name}", config[name]) for name in ("include", "exclude"))
        components = parse_components(config["component"], by, kind)
        named = tokens.parse_tokens(config.get("tokens")) if by in tokens.BY else ()
        return cls(by, kind, include, exclude, components, named)

    def chosen(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Those of a model's layers that an include pattern matches (all without any) and no exclude pattern.

        Raises RequestError for a pattern that matches none, and where none is left.
        """
        for key, patterns in (("layers.include", self.include), ("layers.exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(layer_patterns.matches(path, pattern, key) for path in paths):
                    raise RequestError(key, f"{pattern!r} matches no layer; allowed: {', '.join(paths)}")

        def named(path: str, key: str, patterns: Sequence[str]) -> bool:
            return any(layer_patterns.matches(path, pattern, key) for pattern in patterns)

        kept = [path for path in paths if self.include is None or named(path, "layers.include", self.include)]
        kept = [path for path in kept if not named(path, "layers.exclude", self.exclude or ())]
        if not kept:
            raise RequestError("layers.exclude", "leaves no layer to study")
        return tuple(kept)


def _patterns(key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = distinct(key, value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise RequestError(key, f"must be null or layer paths with * and ?, or re:REGEX; got {value!r}")
        layer_patterns.check(pattern, key)
    return tuple(patterns)
