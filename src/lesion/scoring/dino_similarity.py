"""DINOv2 similarity of an image and its baseline. Range [-1, 1]; exactly 1 for identical pixels.

    dino_similarity(x, y) = <e(x), e(y)> / (|e(x)| |e(y)|)

with e the CLS token of DINOv2's last layer behind the final LayerNorm (`pooler_output` of transformers' Dinov2Model;
`x_norm_clstoken` of the original code), in float32, on the published preprocessing: the shorter side to 256 pixels
(bicubic), the middle 224 x 224, ImageNet mean and standard deviation. Oquab et al. 2023, arXiv:2304.07193. It sees
structure and parts where CLIP sees what a caption would say; "vital layers" of transformers are found by it (Avrahami
et al. 2024, arXiv:2411.14430). Importance of a layer is 1 minus this if `scorer.importance` says so.
"""

from __future__ import annotations

from lesion.scoring import ScorerError, ScorerSpec
from lesion.scoring._dino import dino_identity, embedder
from lesion.scoring._embeddings import BaselineCosine


def identity(spec: ScorerSpec) -> str:
    try:
        return f"dino_similarity/1 ({dino_identity(spec)})"
    except (ValueError, OSError) as error:
        raise ScorerError(f"scorer {spec.name}: DINOv2 {spec.dino_model}: {error}") from error


def build(spec: ScorerSpec, device: str) -> BaselineCosine:
    return BaselineCosine("dino_similarity", embedder(spec, device), spec.batch_size)
