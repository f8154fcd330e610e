"""A results frame with planted effects and its noise floor, for the tests of tables, figures and words."""

from __future__ import annotations

import numpy as np
import pandas as pd

LAYERS = [
    "down_blocks.0.attentions.0",
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.1",
    "up_blocks.1.attentions.0",
]
EFFECTS = (0.02, 0.1, 0.3, 0.0, 0.2)  # importance of the layers; 0: nothing changes
FIXED = {
    **{"model": "tiny", "task": "txt2img", "steps": 4, "guidance": 3.0, "scheduler": "ddim", "negative_prompt": ""},
    **{"height": 64, "width": 64, "branch": "both", "kind": "cross_attention", "strength": 1.0, "lesioned": ""},
    **{"window_start": 0.0, "window_end": 1.0, "status": "ok", "reason": "", "image": "", "order": "", "layer": ""},
    **{"layer_index": -1, "permutation": -1, "replacement": "zero", "aspects": ""},
}


def planted(prompts: int = 6, seeds: int = 2, everything: bool = False, **changes) -> tuple[pd.DataFrame, pd.DataFrame]:
    """leave_one_out and only_one by zero and mean; with `everything` also the other selections, doses and windows.

    Effects vary by a tenth over prompts and seeds. The floor: another seed changes 0.15, another prompt 0.4.
    """
    rng = np.random.default_rng(0)
    rows: list[dict] = []
    floor = []
    for number in range(prompts):
        prompt = {
            "prompt_id": f"p{number}",
            "prompt": f"prompt {number}",
            "aspects": "colour" if number % 2 else "shape",
        }
        for seed in range(seeds):

            def effect(place: int) -> float:
                return EFFECTS[place] * float(1 + rng.normal(0, 0.1))

            def add(selection: str, similarity: float, **more) -> None:
                cell = f"c{len(rows)}"
                known = {"selection": selection, "clip_similarity": similarity, "seed": seed, "cell": cell}  # noqa: B023
                rows.append({**FIXED, **prompt, **known, **more})  # noqa: B023

            add("none", 1.0, replacement="")
            for replacement in ("zero", "mean"):
                for place, layer in enumerate(LAYERS):
                    named = {"layer": layer, "layer_index": place, "replacement": replacement}
                    add("leave_one_out", 1 - effect(place), **named)
                    add("only_one", 0.3 + effect(place), **named)
            if everything:
                for size in range(1, 6):
                    lost = sum(effect(place) for place in range(size))
                    together = {"lesioned": "+".join(LAYERS[:size])}
                    add("cumulative", 1 - lost, order="depth", **together)
                    for chain in range(2):
                        add("coalitions", 1 - lost * (1 + chain / 9), permutation=chain, **together)
                for one, other in ((0, 1), (1, 2)):
                    add("pairs", 1 - effect(one) - effect(other), lesioned=f"{LAYERS[one]}+{LAYERS[other]}")
                for place, layer in enumerate(LAYERS):
                    named = {"layer": layer, "layer_index": place}
                    add("leave_one_out", 1 - effect(place) / 2, strength=0.5, **named)
                    for window in ((0.0, 0.5), (0.5, 1.0)):
                        add(
                            "leave_one_out",
                            1 - effect(place) / 3,
                            window_start=window[0],
                            window_end=window[1],
                            **named,
                        )
        ids = {"model": "tiny", "prompt_id_a": f"p{number}", "seed_a": 0}
        floor.append({**ids, "prompt_id_b": f"p{number}", "seed_b": 1, "similarity": 0.85 + rng.normal(0, 0.01)})
        for other in range(number):
            floor.append({**ids, "prompt_id_b": f"p{other}", "seed_b": 0, "similarity": 0.6 + rng.normal(0, 0.01)})
    return pd.DataFrame(rows).assign(**changes), pd.DataFrame(floor)
