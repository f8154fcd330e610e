"""Cells, their hashes, plans and the store."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace

import pytest

from conftest import settings
from lesion.errors import RequestError
from lesion.study.boxes import Box
from lesion.study.columns import row
from lesion.study.grid import Cell, ModelIdentity, Study
from lesion.study.lesions import Lesion, Replacement, choices
from lesion.study.plan import batches, tally
from lesion.study.prompts import Prompt, parse_prompts, slug
from lesion.study.steering import Layout

MODEL = ModelIdentity("tiny", "f" * 32, "float32")
LAYERS = tuple(f"down_blocks.0.attentions.{i}" for i in range(4))
ZERO, MEAN = Replacement("zero"), Replacement("mean", {"calibration": {"seeds": [1], "prompts": "ab"}})


def study(**changes):
    base = {
        "model": MODEL,
        "settings": settings(),
        "prompts": (Prompt("a", id="a"), Prompt("b", id="b")),
        "seeds": (0, 1, 2),
        "layers": LAYERS,
        "selections": {"leave_one_out": {}, "only_one": {}},
        "replacements": (ZERO, MEAN),
    }
    return Study(**{**base, **changes})


def some_cell(lesion=None, **changes):
    return Cell(MODEL, Prompt("a red circle"), 3, settings(**changes), lesion)


def a_lesion(**changes):
    base = {"selection": "leave_one_out", "layer": LAYERS[0], "layers": LAYERS[:1], "replacement": ZERO}
    return Lesion(**{**base, **changes})


def test_selections():
    assert [(c.layer, c.lesioned) for c in choices("leave_one_out", {}, LAYERS)] == [(p, (p,)) for p in LAYERS]
    for choice, path in zip(choices("only_one", {}, LAYERS), LAYERS, strict=True):
        assert choice.layer == path
        assert choice.lesioned == tuple(other for other in LAYERS if other != path)
    assert [(c.layer, c.lesioned) for c in choices("all", {}, LAYERS)] == [("", LAYERS)]
    assert choices("none", {}, LAYERS) == []
    with pytest.raises(RequestError, match="unknown selection 'most'; allowed: all, coalitions, cumulative, "):
        choices("most", {}, LAYERS)
    with pytest.raises(RequestError, match="unknown option 'k'; allowed: none"):
        choices("all", {"k": 1}, LAYERS)
    with pytest.raises(RequestError, match="only_one needs at least two layers"):
        choices("only_one", {}, LAYERS[:1])


def test_selections_of_several_layers():
    a, b, c, d = layers = ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "mid_block", "up_blocks.1")

    def lesioned(name, **options):
        return [choice.lesioned for choice in choices(name, options, layers)]

    assert lesioned("pairs") == [(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)]
    assert lesioned("cumulative") == [(a,), (a, b), (a, b, c), layers]
    assert lesioned("cumulative", order="reverse") == [(d,), (c, d), (b, c, d), layers]
    assert lesioned("cumulative", order=[c, a, d, b]) == [(c,), (a, c), (a, c, d), layers]
    assert [choice.layer for choice in choices("cumulative", {"order": [c, a, d, b]}, layers)] == [c, a, d, b]
    assert lesioned("neighbours", size=3) == [(a, b, c), (b, c, d)]
    assert lesioned("neighbours", size=4) == [layers]
    spans = lesioned("neighbours", size="every")
    assert spans == [layers[i : i + n] for n in range(1, 5) for i in range(5 - n)] and len(set(spans)) == 10
    assert lesioned("neighbours", size=[4, 1]) == [layers, *((layer,) for layer in layers)]
    assert lesioned("custom", groups=[["down_blocks.*"], ["up_blocks.1", "mid_block"]]) == [(a, b), (c, d)]


def test_coalitions_are_the_prefixes_of_random_orders():
    layers = tuple("abcdef")
    found = choices("coalitions", {"permutations": 5, "seed": 3}, layers)
    assert found == choices("coalitions", {"permutations": 5, "seed": 3}, layers)
    sets = [choice.lesioned for choice in found]
    assert sets != [choice.lesioned for choice in choices("coalitions", {"permutations": 5, "seed": 4}, layers)]
    assert len(sets) == 5 * 6 > len(set(sets))  # every order ends with all layers
    assert all(lesioned == tuple(sorted(lesioned)) for lesioned in sets)  # in forward order
    for number in range(5):
        chain = found[6 * number : 6 * number + 6]
        assert [(one.place.permutation, one.place.position) for one in chain] == [(number, k) for k in range(1, 7)]
        assert [len(one.lesioned) for one in chain] == [1, 2, 3, 4, 5, 6]
        assert all(set(small.lesioned) < set(large.lesioned) for small, large in itertools.pairwise(chain))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pairs", {"n": 2}, "unknown option 'n'"),
        ("cumulative", {"order": "random"}, "depth, reverse"),
        ("cumulative", {"order": ["a"]}, "every layer"),
        ("neighbours", {"size": 0}, "from 1 to 3"),
        ("neighbours", {"size": "all"}, "or every; got 'all'"),
        ("neighbours", {"size": [1, 2, 4]}, "from 1 to 3"),
        ("neighbours", {"size": [2, 2]}, "twice"),
        ("neighbours", {"size": 4}, "from 1 to 3"),
        ("custom", {}, "at least one"),
        ("custom", {"groups": "a"}, "at least one"),
        ("custom", {"groups": ["a"]}, "lists of layer paths"),
        ("custom", {"groups": [["z*"]]}, "'z*' matches no layer"),
        ("coalitions", {"permutations": 0}, "selection.coalitions.permutations"),
        ("coalitions", {"seed": -1}, "selection.coalitions.seed"),
    ],
)
def test_selections_refuse_what_makes_no_sense(name, options, words):
    with pytest.raises(RequestError, match=f"selection.{name}") as error:
        choices(name, options, ("a", "b", "c"))
    assert words in str(error.value)


def test_rows_name_all_lesioned_layers_where_the_layer_does_not():
    def lesioned(selection, layer, layers):
        return row(some_cell(Lesion(selection, layer, layers, ZERO)), LAYERS)["lesioned"]

    assert lesioned("leave_one_out", LAYERS[0], LAYERS[:1]) == ""
    assert lesioned("only_one", LAYERS[0], LAYERS[1:]) == ""
    assert lesioned("pairs", "", LAYERS[:2]) == f"{LAYERS[0]}+{LAYERS[1]}"
    assert lesioned("cumulative", LAYERS[1], LAYERS[:2]) == f"{LAYERS[0]}+{LAYERS[1]}"
    assert lesioned("all", "", LAYERS) == "+".join(LAYERS)
    assert row(some_cell(), LAYERS)["lesioned"] == ""


def test_the_grid_is_complete_and_starts_with_the_baselines():
    cells = list(study().cells())
    assert len(cells) == len(study()) == 6 * (1 + 2 * 2 * 4)
    assert all(cell.lesion is None for cell in cells[:6])
    assert all(cell.lesion is not None for cell in cells[6:])
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.baseline.key for cell in cells} == {cell.key for cell in cells[:6]}
    kinds = [
        kind for kind, _ in itertools.groupby(cells[6:], lambda c: (c.lesion.selection, c.lesion.replacement.name))
    ]
    assert kinds == list(itertools.product(("leave_one_out", "only_one"), ("zero", "mean")))
    subjects = [(prompt, seed) for prompt in "ab" for seed in (0, 1, 2)]
    assert [(c.prompt.text, c.seed, c.lesion.layer) for c in cells[6:30]] == [
        (*subject, layer) for subject in subjects for layer in LAYERS
    ]


def test_the_length_counts_every_axis_without_walking_the_cells():
    axes = {"windows": ((0.0, 0.5), (0.5, 1.0)), "branches": ("both", "cond"), "strengths": (0.5, 1.0)}
    for changes in (
        axes,
        {"selections": {}},
        {"selections": {"none": {}, "all": {}}},
        {"replacements": ()},
        {"strengths": (0.0,)},
    ):
        assert len(study(**changes)) == sum(1 for _ in study(**changes).cells())
    assert len(study(seeds=range(10**12))) == 2 * 10**12 * 17
    with pytest.raises(RequestError, match="only_one needs at least two layers"):
        len(study(layers=LAYERS[:1], replacements=()))


def test_the_plan_goes_kind_by_kind_and_within_a_kind_lesion_by_lesion():
    whole = study()
    plan = list(whole.in_plan_order())
    assert {cell.key: cell for cell in plan} == {cell.key: cell for cell in whole.cells()}
    assert len(plan) == len(whole)
    subjects = [(prompt, seed) for prompt in "ab" for seed in (0, 1, 2)]
    runs = [(lesion, [(c.prompt.text, c.seed) for c in run]) for lesion, run in itertools.groupby(plan, lesion_of)]
    assert [lesion for lesion, _ in runs] == [None, *whole.lesions()]
    assert all(run == subjects for _, run in runs)


def lesion_of(cell):
    return cell.lesion


def test_the_plan_holds_each_image_once():
    twice = study(
        prompts=(Prompt("a", id="a"), Prompt("b", id="b"), Prompt("a", id="c")),
        seeds=(1, 1),
        layers=LAYERS[:2],  # leaving one of two out is keeping the other alone
        strengths=(0.0, 1.0),  # a lesion of strength 0 is the baseline
        replacements=(ZERO, Replacement("zero")),
    )
    keys = [cell.key for cell in twice.in_plan_order()]
    assert len(keys) == len(set(keys)) == 2 * (1 + 2)
    assert set(keys) == {cell.key for cell in twice.cells()}
    assert next(twice.in_plan_order()).prompt.id == "a"


def test_the_hash_stays_what_it_was():
    """A stored image must be found by later versions: these hashes may change only together with study.FORMAT."""
    assert some_cell().key == "5d5d00d02cb87f8e590da5a3bac32227"
    assert some_cell(a_lesion()).key == "e7e38d4548d8ea96aef33eb66f78d9ac"


def key_by_the_book(identity):
    """The recipe in `Cell.key`, from the identity's JSON alone."""

    def sha256(text):
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def digest(data):
        return sha256(json.dumps(data, sort_keys=True, ensure_ascii=False))

    data = json.loads(json.dumps(identity, ensure_ascii=False))
    prompt, seed, lesion = data.pop("prompt"), data.pop("seed"), data.pop("lesion")
    return sha256("\n".join([digest(data), sha256(prompt), str(seed), digest(lesion)]))[:32]


ODD_PROMPTS = ("", "a\n0", "a\n", "é", "e\u0301", "\U0001f600", "\ud83d\ude00", "\udc80", "\\udc80", '"', "null", "\0")


def test_the_hash_follows_from_the_identity_by_its_recipe():
    model = ModelIdentity("tiny", "f" * 32, "float16", "cuda")
    whole = study(
        model=model,
        settings=settings(negative_prompt="ugly ü"),
        prompts=tuple(Prompt(text, id=str(i)) for i, text in enumerate(ODD_PROMPTS)),
        seeds=(0, 2**63 - 1),
        replacements=(ZERO, MEAN, Replacement("mean", {"words": "ü"})),
        strengths=(0.0, 0.5, 1.0),
        windows=((0.0, 1.0), (0.25, 0.5)),
        branches=("both", "uncond"),
    )
    subset = list(itertools.chain(itertools.islice(whole.cells(), 24), itertools.islice(whole.cells(), 24, None, 7)))
    for cell in subset:  # keys that the study composed, and those of cells made alone
        alone = Cell(cell.model, cell.prompt, cell.seed, cell.settings, cell.lesion)
        assert cell.key == alone.key == key_by_the_book(cell.identity())


def test_the_hash_tells_any_two_prompts_apart():
    cells = [Cell(MODEL, Prompt(text), seed, settings(), None) for text in ODD_PROMPTS for seed in (0, 1, 10)]
    assert len({cell.key for cell in cells}) == len(cells)


def test_asking_for_the_hash_changes_no_data():
    cell = some_cell(a_lesion(strength=0.5))
    before = cell.identity(), dict(vars(cell.settings))
    assert cell.key
    assert (cell.identity(), vars(cell.settings)) == before
    assert cell == some_cell(a_lesion(strength=0.5))
    assert replace(cell, seed=4).key != cell.key
    assert replace(cell, lesion=replace(cell.lesion, strength=1.0)).key == some_cell(a_lesion()).key


def test_the_hash_tells_apart_what_changes_pixels_and_nothing_else():
    different = [
        some_cell(),
        Cell(MODEL, Prompt("a red circle "), 3, settings(), None),
        Cell(MODEL, Prompt("a red circle"), 4, settings(), None),
        Cell(ModelIdentity("tiny", "e" * 32, "float32"), Prompt("a red circle"), 3, settings(), None),
        Cell(ModelIdentity("tiny", "f" * 32, "float16"), Prompt("a red circle"), 3, settings(), None),
        *(some_cell(**change) for change in ({"steps": 5}, {"guidance": 4.0}, {"height": 24}, {"width": 24})),
        *(some_cell(**change) for change in ({"scheduler": "X"}, {"negative_prompt": "b"}, {"negative_prompt": ""})),
        *(some_cell(a_lesion(layers=LAYERS[i:j])) for i, j in itertools.combinations(range(5), 2)),
        *(some_cell(a_lesion(**c)) for c in ({"replacement": MEAN}, {"window": (0.0, 0.5)}, {"branch": "cond"})),
        some_cell(a_lesion(strength=0.5)),
        some_cell(a_lesion(replacement=Replacement("mean", {"calibration": {"seeds": [2], "prompts": "ab"}}))),
    ]
    keys = [cell.key for cell in different]
    assert len(set(keys)) == len(keys)
    same = [
        Cell(ModelIdentity("other name", "f" * 32, "float32"), Prompt("a red circle"), 3, settings(), None),
        Cell(MODEL, Prompt("a red circle", ("colour",), "id"), 3, settings(), None),
        some_cell(a_lesion(strength=0.0)),
    ]
    assert {cell.key for cell in same} == {some_cell().key}
    label = a_lesion(selection="only_one", layer=LAYERS[2])
    assert some_cell(label).key == some_cell(a_lesion()).key


def test_batches_hold_every_missing_cell_once_and_no_two_kinds():
    whole = study()
    stored = {cell.key for cell in itertools.islice(whole.cells(), 0, None, 3)}
    for cells in (whole, whole.cells(), [*whole.cells(), *whole.cells()]):
        made = list(batches(cells, 8, stored.__contains__))
        keys = [cell.key for batch in made for cell in batch]
        assert sorted(keys) == sorted({cell.key for cell in whole.cells()} - stored)
        assert all(len(batch) <= 8 for batch in made)
        for batch in made:
            assert len({(c.lesion and (c.lesion.selection, c.lesion.replacement)) for c in batch}) == 1
        assert any(len({(c.prompt.text, c.seed) for c in batch}) > 1 for batch in made)  # prompts and seeds are mixed


def test_a_study_is_batched_so_that_most_batches_hold_one_lesion():
    large = study(seeds=range(48))  # 96 subjects, 6 full batches a lesion
    made = list(batches(large, 16, lambda key: False))
    assert len(made) == len(large) / 16
    assert all(len(set(map(lesion_of, batch))) == 1 for batch in made)
    uneven = list(batches(large, 20, lambda key: False))
    assert sum(len(set(map(lesion_of, batch))) == 1 for batch in uneven) >= len(uneven) * 0.75
    assert max(len(set(map(lesion_of, batch))) for batch in uneven) == 2


def test_the_size_of_a_batch_can_be_asked_for_anew():
    sizes = iter([4, 1, 2, 3, *[100] * 20])
    made = list(batches(study(), lambda: next(sizes), lambda key: False))
    assert [len(batch) for batch in made] == [4, 1, 1, 3, 21, 24, 24, 24]  # the third ends with the 6 baselines
    current = 8
    plan = batches(study(), lambda: current, lambda key: False)
    next(plan), next(plan)
    current = 3  # shrinks while the second batch is at work
    assert len(next(plan)) == 3
    for wrong in (0, lambda: -1):
        with pytest.raises(ValueError, match="at least one"):
            list(batches(study(), wrong, lambda key: False))


def test_batches_are_planned_as_they_are_asked_for():
    asked = []
    plan = batches(study(seeds=range(1000)), 4, lambda key: bool(asked.append(key)))
    keys = [cell.key for batch in (next(plan), next(plan)) for cell in batch]
    assert asked == keys


def test_a_list_in_one_job_and_a_sweep_make_the_same_batches():
    def company(study):
        return {tuple(cell.key for cell in batch) for batch in batches(study, 5, lambda key: False)}

    swept = set()
    for selection in ("leave_one_out", "only_one"):
        for replacement in (ZERO, MEAN):
            swept |= company(study(selections={selection: {}}, replacements=(replacement,)))
    assert company(study()) == swept


def test_tally():
    counts = tally(study().cells(), lambda key: False)
    assert (counts.rows, counts.baselines, counts.unique, counts.missing) == (102, 6, 102, 102)
    assert counts.by_mode["leave_one_out / mean"] == 24
    two = study(layers=LAYERS[:2], replacements=(ZERO,))  # leaving one of two out is keeping the other alone
    counts = tally(two.cells(), lambda key: True)
    assert (counts.rows, counts.unique, counts.missing) == (30, 18, 0)


def test_the_unsteered_images_of_a_steered_study_are_planned_first_and_apart():
    layout = Layout(LAYERS, 30.0, 0.2, 5, 10, "noise_share", "covered")
    steered, plain = study(settings=settings(steering=layout)), study(selections={})
    unsteered = [cell.key for cell in plain.in_plan_order()]
    planned = list(steered.in_plan_order())
    assert [cell.key for cell in planned[:6]] == unsteered == [cell.unsteered.key for cell in planned[6:12]]
    assert list(steered.keys()) == [cell.key for cell in planned] and len(planned) == 6 + len(steered)
    assert [len(batch) for batch in batches(steered, 4, lambda key: False)][:4] == [4, 2, 4, 2]
    counts = tally(steered, unsteered[:2].__contains__)
    assert (counts.rows, counts.unique, counts.stored, counts.by_mode["unsteered"]) == (102, 108, 2, 6)
    assert counts.missing_by_mode["unsteered"] == 4 and counts.missing_by_mode["baseline"] == 6
    assert plain.unsteered is None and some_cell().unsteered is None


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": LAYERS[:2]}, {"strengths": (0.0, 1.0)}, {"selections": {"none": {}}}, {"seeds": (1, 1)}],
    ids=str,
)
def test_a_study_and_its_cells_are_counted_alike(changes):
    whole = study(**changes)
    assert list(whole.keys()) == [cell.key for cell in whole.in_plan_order()]
    stored = set(itertools.islice(whole.keys(), 0, None, 3))
    by_study, by_cells = tally(whole, stored.__contains__), tally(iter(list(whole.cells())), stored.__contains__)
    assert by_study == by_cells
    assert list(by_study.by_mode) == list(by_cells.by_mode)
    assert by_study.rows == len(whole) == sum(by_study.by_mode.values())
    assert by_study.stored == len(stored)
    first = set(itertools.islice(whole.keys(), 3))
    assert tally(whole, first.__contains__, 3) == tally(whole, first.__contains__)
    assert tally(whole, pytest.fail, 0) == tally(whole, lambda key: False)


LAYOUT = Layout(LAYERS, 30.0, 0.2, 5, 10, "noise_share", "covered")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"settings": settings(steering=LAYOUT), "model": replace(MODEL, device="cuda", switches=("tf32",))},
        {"prompts": (Prompt("é", id="a", digest="d" * 64, boxes=(Box("a", (0.0, 0.1, 0.5, 1.0)),)),)},
        {"strengths": (0.0, 0.3), "windows": ((0.1, 0.7),), "settings": settings(negative_prompt="x", noise="own")},
    ],
    ids=str,
)
def test_records_of_images_tell_whether_they_are_of_a_study(changes):
    whole = study(**changes)
    records = [json.loads(json.dumps(cell.identity())) for cell in whole.in_plan_order()]
    assert all(map(whole.may_have, records))
    others = (
        study(**{**changes, "seeds": (3,)}),
        study(**{**changes, "layers": LAYERS[:2]}),
        study(model=replace(MODEL, dtype="x")),
    )
    for other in others:
        held = {cell.key for cell in other.in_plan_order()}
        assert [other.may_have(record) for record in records] == [cell.key in held for cell in whole.in_plan_order()]
    assert whole.may_have({"cell": "of another version"})
    assert not whole.may_have({**records[0], "seed": [0], "prompt": 5, "model": None})


def test_rows_name_the_layer_and_its_depth():
    record = row(some_cell(a_lesion()), LAYERS)
    assert (record["layer"], record["layer_index"], record["selection"]) == (LAYERS[0], 0, "leave_one_out")
    baseline = row(some_cell(), LAYERS)
    assert (baseline["layer"], baseline["layer_index"], baseline["selection"]) == ("", -1, "none")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n\n  a dog, happy \n"),
        ("p.csv", 'prompt,aspects,note\na cat,colour;count,1\n"a dog, happy",,2\n'),
        ("p.jsonl", '{"text": "a cat", "aspects": ["colour", "count"]}\n{"prompt": "a dog, happy"}\n'),
    ],
)
def test_prompt_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    label, prompts, _ = parse_prompts({"path": str(path)})
    assert label == "p"
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog, happy"]
    assert prompts[0].aspects == (() if name == "p.txt" else ("colour", "count"))
    assert prompts[0].id == slug("a cat")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "is empty"),
        ("p.csv", "words\na cat\n", "no `text`"),
        ("p.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is no valid JSON"),
        ("p.jsonl", "3\n", "a prompt is a text or a mapping"),
        ("p.jsonl", '{"text": "a", "id": "../b"}\n', "prompt id '../b' is not allowed"),
        ("p.yaml", "a", "unknown ending"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RequestError, match=message) as error:
        parse_prompts({"path": str(path)})
    assert str(error.value).startswith("prompts.path: ")


def test_missing_and_unreadable_prompt_files(tmp_path):
    with pytest.raises(RequestError, match="cannot read"):
        parse_prompts({"path": str(tmp_path / "no.txt")})
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RequestError, match="cannot read"):
        parse_prompts({"path": str(tmp_path / "b.txt")})
