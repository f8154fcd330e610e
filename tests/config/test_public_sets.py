"""The overlays of public prompt sets, each on a made-up file of the form in which the set is published."""

from __future__ import annotations

import pytest
import yaml

from lesion.config.schema import conf_dir
from lesion.study.prompts import Prompt, parse_prompts, slug

SETS = {
    "parti": (
        {"PartiPrompts.tsv": 'Prompt\tCategory\tChallenge\tNote\na "red" hat\tArtifacts\tBasic\t\n'
                             '42\tAbstract\tProperties & Positioning\tSaid by "us"\n'},
        [('a "red" hat', ("Artifacts", "Basic"), ""), ("42", ("Abstract", "Properties & Positioning"), "")],
    ),
    "drawbench": (
        {"drawbench.csv": 'Prompts,Category\nA red hat.,Colors\n"A cat, and a dog.",Gary Marcus et al. \n'},
        [("A red hat.", ("Colors",), ""), ("A cat, and a dog.", ("Gary Marcus et al.",), "")],
    ),
    "geneval": (
        {"evaluation_metadata.jsonl": '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": '
                                      '[{"class": "cat", "count": 3}], "prompt": "a photo of two cats"}\n'
                                      '{"tag": "colors", "include": [], "prompt": "a photo of a red hat"}\n'},
        [("a photo of two cats", ("counting",), ""), ("a photo of a red hat", ("colors",), "")],
    ),
    "t2i_compbench": (
        {"color_val.txt": "a green bench and a red car\na red car\na green bench and a red car\n"},
        [("a green bench and a red car", (), ""), ("a red car", (), "")],
    ),
    "dpg_bench": (
        {"prompts/1.txt": "A red hat on a shelf.\n", "prompts/COCO_7.txt": "Two cats."},
        [("A red hat on a shelf.", (), "1"), ("Two cats.", (), "COCO_7")],
    ),
    "tifa": (
        {"tifa_v1.0_text_inputs.json": '[{"id": "coco_1", "caption": "A red hat.", "coco_val_id": "9"}, '
                                       '{"id": "drawbench_5", "caption": "Two cats."}]'},
        [("A red hat.", (), "coco_1"), ("Two cats.", (), "drawbench_5")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_loads_as_it_is_published(name, tmp_path):
    files, expected = SETS[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content, encoding="utf-8")
    data = yaml.safe_load((conf_dir() / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"))
    path = tmp_path / next(iter(files))
    found = parse_prompts(data | {"path": str(path.parent if name == "dpg_bench" else path)})
    assert list(found.prompts) == [Prompt(text, aspects, id or slug(text)) for text, aspects, id in expected]
    assert all("repeat" in note for note in found.notes)  # nothing had to be guessed
