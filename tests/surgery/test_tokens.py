"""Lesions of single text tokens, against diffusers' attention masks, plain hooks and attention written out by hand."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from scipy.stats import fisher_exact

import lesion as lesion_package
from conftest import settings, tiny_spec
from denoisers import TEXT, apart, build, hooked, inputs, lesion, same, under
from lesion import models, replacements
from lesion.denoising.run import COND, UNCOND
from lesion.errors import RequestError
from lesion.generation.generate import generate, token_places
from lesion.models.components import asked_paths
from lesion.models.tokens import check_texts, columns_of
from lesion.models.words import in_parts
from lesion.replacements.mask import Mask
from lesion.replacements.resample import Resample
from lesion.replacements.zero import Zero
from lesion.run.job import examined
from lesion.study.columns import kinds
from lesion.study.components import component_of
from lesion.study.grid import Cell
from lesion.study.layers import Layers
from lesion.study.lesions import Lesion
from lesion.study.prompts import Prompt
from lesion.study.tokens import expanded, parse_tokens
from lesion.surgery.anatomy import examine
from lesion.surgery.operation import replacement_key
from lesion.surgery.tokens import Places, with_tokens
from lesion.toy_world import read_image
from test_components import pipeline, plain

TEXTS, SEEDS = ("a red circle", "two big blue STARS"), (0, 7)
WORD = r"re:^(red|blue)$"  # at another place in each of them


def asked(tokens, kind="cross_attention", by="attention_token", component="denoiser"):
    return Layers.of(
        {"by": by, "tokens": tokens, "kind": kind, "include": None, "exclude": None, "component": component}
    )


@lru_cache
def loaded(folder, tokens=(WORD, "padding"), kind="cross_attention"):
    source = models.resolve(tiny_spec(folder))
    return examined(models.load(source, "cpu"), source, asked(list(tokens), kind))


def images(model, name, replacement="zero", options=None, layers=None, texts=TEXTS, **changes):
    """Of every text with its seed under one lesion of a set of tokens: in all layers, or in these."""
    paths = [path for path in layers or model.anatomy.paths if path.endswith(f".tokens.{name}")]
    described = replacements.describe(replacement, options or {})
    one = Lesion("all", "", tuple(paths), described, kind=model.anatomy.kind, **changes)
    embedded = True if hasattr(model.denoiser.config, "guidance_embeds") else None
    side = 32 if type(model.pipe).__name__.startswith(("Sana", "Hunyuan")) else 16
    given = settings(
        steps=2, scheduler=type(model.pipe.scheduler).__name__, embedded_guidance=embedded, height=side, width=side
    )
    cells = [Cell(model.identity, Prompt(text), seed, given, one) for text, seed in zip(texts, SEEDS, strict=False)]
    bench = replacements.Bench(model, given, None, 2)
    built = {replacement_key(one): replacements.build(replacement, options or {}, bench)}
    return generate(model, cells, built)


def test_a_set_in_a_whole_component_is_that_set_in_each_of_its_layers(folder_of):
    model, source = loaded(folder_of("sd")), models.resolve(tiny_spec(folder_of("sd")))
    layers = asked([WORD, "padding"], by="token", component=["text_encoder", "denoiser"])
    whole = examined(models.load(source, "cpu"), source, layers)
    assert whole.anatomy.paths == (f"denoiser.tokens.{WORD}", "denoiser.tokens.padding")
    assert asked_paths(source, layers) == (*whole.components["text_encoder"].paths, *whole.anatomy.paths)
    assert [component_of(path) for path in asked_paths(source, layers)] == [*["text_encoder"] * 2, *["denoiser"] * 2]
    for replacement in ("zero", "mask"):
        assert np.array_equal(images(whole, WORD, replacement), images(model, WORD, replacement))
    both = images(whole, WORD, layers=asked_paths(source, layers))
    assert not np.array_equal(both, images(whole, WORD))


def places_of(model, name):
    """The places of a set in each text, told by the tokenizer without `lesion`: its pieces are single bytes."""
    tokenizer = model.pipe.tokenizer
    found = []
    for text in TEXTS:
        ids = tokenizer(text, padding="max_length", max_length=77)["input_ids"]
        start = 1 + len(text.replace(" ", "").split({"a red circle": "red"}.get(text, "blue"))[0])
        if name == "padding":
            found.append(list(range(2 + len(text.replace(" ", "")), 77)))
        else:
            found.append(list(range(start, start + len("red" if "red" in text else "blue"))))
        assert name == "padding" or tokenizer.decode([ids[one] for one in found[-1]]).replace(" ", "") in text
    return found


def masked(places):
    """Plain diffusers: every call of the UNet gets an attention mask over the text of the conditional rows."""

    def give(module, args, kwargs):
        mask = torch.ones(4, 77)
        for row, columns in enumerate(places):
            mask[2 + row, columns] = 0
        return args, {**kwargs, "encoder_attention_mask": mask}

    return give


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("tokens", [WORD, "padding"])
def test_masked_keys_are_an_attention_mask(name, tokens, folder_of):
    """SDXL's two encoders share the places of their tokens."""
    folder = folder_of(name)
    model = loaded(folder)
    pipe = pipeline(folder)
    handle = pipe.unet.register_forward_pre_hook(masked(places_of(model, tokens)), with_kwargs=True)
    try:
        expected = plain(folder, texts=TEXTS, seeds=SEEDS)
    finally:
        handle.remove()
    ours = images(model, tokens, "mask", branch="cond")
    assert np.abs(ours - expected).max() < 2e-5
    assert np.abs(ours - plain(folder, texts=TEXTS, seeds=SEEDS)).max() > 1e-3


def test_values_of_zero_are_a_plain_hook_to_the_bit(folder_of):
    folder = folder_of("sd")
    model = loaded(folder)
    layer = model.anatomy.layers[2].sites[0].hook.module
    chosen = [model.anatomy.layers[2].path]
    assert chosen[0].startswith(layer.partition(".transformer_blocks")[0])
    scaled = {"by": 0.0}

    def hook(module, args, output):
        changed = output.clone()
        for row, columns in enumerate(places_of(model, WORD)):
            changed[2 + row, columns] *= scaled["by"]
        return changed

    def on_values(pipe):
        return [(pipe.unet.get_submodule(f"{layer}.to_v"), hook)]

    expected = plain(folder, on_values, texts=TEXTS, seeds=SEEDS)
    assert np.array_equal(images(model, WORD, layers=chosen, branch="cond"), expected)
    # The output is linear in the values, so half a lesion is half of them; the negative prompt lacks the word.
    scaled["by"] = 0.5
    half = plain(folder, on_values, texts=TEXTS, seeds=SEEDS)
    for branch in ("cond", "both"):
        assert np.abs(images(model, WORD, layers=chosen, branch=branch, strength=0.5) - half).max() < 2e-5
    untouched = plain(folder, texts=TEXTS, seeds=SEEDS)
    assert np.abs(half - untouched).max() > 1e-4
    assert np.array_equal(images(model, WORD, layers=chosen, window=(0.0, 0.5), strength=0.0), untouched)
    assert not np.array_equal(images(model, WORD, layers=chosen, window=(0.5, 1.0)), untouched)


def test_padding_in_its_own_place_is_the_baseline_to_the_bit(folder_of):
    model, text = loaded(folder_of("sd")), TEXTS[:1]
    untouched = plain(folder_of("sd"), texts=text, seeds=SEEDS[:1])
    own = {"prompt": text[0]}
    assert np.array_equal(images(model, "padding", "donor_prompt", own, texts=text, branch="cond"), untouched)
    other = images(model, "padding", "donor_prompt", {"prompt": "two"}, texts=text, branch="cond")
    assert not np.array_equal(other, untouched)
    # With the same noise the donor's own run has the same keys and values.
    pair = np.concatenate([images(model, "padding", "resample", {"prompt": one}, texts=text) for one in (text[0], "")])
    assert np.abs(pair[0] - untouched[0]).max() < 1e-5 < np.abs(pair[1] - untouched[0]).max()


@pytest.mark.parametrize(("name", "options"), [("donor_prompt", {"prompt": "some DOG"}), ("null_prompt", {})])
def test_tokens_of_another_text_are_its_features_at_their_places(name, options, folder_of):
    folder = folder_of("sd")
    model, other = loaded(folder), options.get("prompt", "")
    tokenizer, encoder = model.pipe.tokenizer, model.pipe.text_encoder
    ids = tokenizer(other, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        features = encoder(ids)[0]

    def put_in(module, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        for row, columns in enumerate(places_of(model, WORD)):
            text[2 + row, columns] = features[0, columns]
        return args, {**kwargs, "encoder_hidden_states": text}

    handle = pipeline(folder).unet.register_forward_pre_hook(put_in, with_kwargs=True)
    try:
        expected = plain(folder, texts=TEXTS, seeds=SEEDS)
    finally:
        handle.remove()
    ours = images(model, WORD, name, options, branch="cond")
    assert np.abs(ours - expected).max() < 2e-5
    assert np.abs(ours - plain(folder, texts=TEXTS, seeds=SEEDS)).max() > 1e-4


CHOSEN = ((1, 3), (0,), ())  # of each row; the last has none


def by_hand(attn, hidden, text, rotary, changed):
    """Joint attention in which the image's queries see changed text keys and values: (image, text) before projection.

    changed: (keys, values, scores of image queries on text) -> the same three. text: None where `hidden` holds it.
    """

    def heads(tensor, norm=None):
        tensor = tensor.unflatten(-1, (attn.heads, -1))
        return tensor if norm is None else norm(tensor)

    key, value = attn.to_k(hidden), attn.to_v(hidden)
    query = heads(attn.to_q(hidden), attn.norm_q)
    keys, values = [], []
    for change in (False, True):
        if text is None:
            k, v = changed(key, value) if change else (key, value)
            k, v, q = heads(k, attn.norm_k), heads(v), query
        else:
            of_text = attn.add_k_proj(text), attn.add_v_proj(text)
            of_text = changed(*of_text) if change else of_text
            k = torch.cat([heads(of_text[0], attn.norm_added_k), heads(key, attn.norm_k)], dim=1)
            v = torch.cat([heads(of_text[1]), heads(value)], dim=1)
            q = torch.cat([heads(attn.add_q_proj(text), attn.norm_added_q), query], dim=1)
        if rotary is not None:
            q, k = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (q, k))
        keys.append(k)
        values.append(v)
    found = []
    for k, v, blind in zip(keys, values, (False, changed is None or getattr(changed, "blind", False)), strict=True):
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
        if blind:
            for row, columns in enumerate(CHOSEN):
                scores[row, :, :, list(columns)] = -torch.inf
        found.append(torch.einsum("bhqk,bkhc->bqhc", scores.softmax(dim=-1), v).flatten(2))
    return found[1][:, TEXT:], found[0][:, :TEXT]


def zeroed(keys, values):
    values = values.clone()
    for row, columns in enumerate(CHOSEN):
        values[row, list(columns)] = 0
    return keys, values


def unseen(keys, values):
    return keys, values


unseen.blind = True


def swapped(keys, values):
    """Of the first row: keys and values of the third, an image of the donor with the same noise."""
    keys, values = keys.clone(), values.clone()
    columns = list(CHOSEN[0])
    keys[0, columns], values[0, columns] = keys[2, columns], values[2, columns]
    return keys, values


JOINT = [("sd3", "transformer_blocks.0"), ("sd3", "transformer_blocks.1"), ("flux", "transformer_blocks.0"),
         ("flux", "single_transformer_blocks.0")]  # fmt: skip


def of_image(change):
    """A hook on a joint attention: the image's half by hand, with this change; the text's as it is."""

    def hook(module, args, kwargs, output):
        text = kwargs.get("encoder_hidden_states")
        image, words = by_hand(module, kwargs["hidden_states"], text, kwargs.get("image_rotary_emb"), change)
        if text is None:
            return torch.cat([words, image], dim=1)
        return module.to_out[0](image), output[1]

    return hook


@pytest.mark.parametrize(("name", "layer"), JOINT)
@pytest.mark.parametrize(("intervention", "change"), [(Zero(), zeroed), (Mask(), unseen)], ids=["zero", "mask"])
def test_joint_attention_is_the_image_s_alone(name, layer, intervention, change):
    """What the text gets in the same attention stays."""
    denoiser, calls = build(name), inputs(name, 3)
    anatomy = with_tokens(examine(denoiser, kind="text_to_image"), ["one", "another"])
    of = [{(COND, "one"): columns[:1], (COND, "another"): columns[1:]} for columns in CHOSEN]
    paths = expanded([layer], ["one", "another"])
    lesions = [lesion(*paths, kind="text_to_image")] * 3

    ours = under(denoiser, anatomy, lesions, calls, intervention, Places(of, TEXT))
    expected = hooked(denoiser, {f"{layer}.attn": of_image(change)}, calls)
    plainly = hooked(denoiser, {}, calls)
    assert apart(ours, expected) < 1e-5
    assert apart(ours, plainly) > 1e-3
    assert same([one[2:] for one in ours], [one[2:] for one in plainly])  # a row without such tokens keeps every bit


@pytest.mark.parametrize(("name", "layer"), JOINT)
def test_all_tokens_masked_are_no_text_for_the_image(name, layer):
    """Against `layers.kind=text_to_image` by zero, which is another way there."""
    denoiser, calls = build(name), inputs(name, 2)
    whole = examine(denoiser, kind="text_to_image")
    anatomy = with_tokens(whole, ["all"])
    places = Places([{(COND, "all"): tuple(range(TEXT))}] * 2, TEXT)
    ours = under(denoiser, anatomy, [lesion(f"{layer}.tokens.all", kind="text_to_image")] * 2, calls, Mask(), places)
    assert apart(ours, under(denoiser, whole, [lesion(layer, kind="text_to_image")] * 2, calls)) < 1e-5


@pytest.mark.parametrize(("name", "layer"), [JOINT[0], JOINT[2], JOINT[3]])
def test_tokens_of_a_donor_s_own_run(name, layer):
    denoiser, calls = build(name), inputs(name, 4)  # two images, and behind them their donors
    anatomy = with_tokens(examine(denoiser, kind="text_to_image"), ["it"])
    places = Places([{(COND, "it"): CHOSEN[0]}, {}, {}, {}], TEXT)
    lesions = [lesion(f"{layer}.tokens.it", kind="text_to_image"), None, None, None]

    ours = under(denoiser, anatomy, lesions, calls, Resample("x", guided=False), places)
    assert apart(ours, hooked(denoiser, {f"{layer}.attn": of_image(swapped)}, calls)) < 1e-5
    assert apart(ours, hooked(denoiser, {}, calls)) > 1e-4


def test_every_token_of_cross_attention_masked_leaves_its_bias():
    denoiser, calls = build("unet"), inputs("unet", 2)
    anatomy = with_tokens(examine(denoiser), ["all"])
    site = anatomy.layers[1].sites[0]

    def hook(module, args, kwargs, output):
        return module.to_out[0].bias.expand_as(output)

    places = Places([{(COND, "all"): tuple(range(7))}] * 2, 7)
    for intervention in (Mask(), Zero()):
        ours = under(denoiser, anatomy, [lesion(anatomy.layers[1].path)] * 2, calls, intervention, places)
        assert apart(ours, hooked(denoiser, {site.hook.module: hook}, calls)) < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("sd3", "text_to_image"), ("flux", "text_to_image"),
                                            ("pixart_sigma", "cross_attention"), ("sana", "cross_attention"),
                                            ("hunyuan_dit", "cross_attention")])  # fmt: skip
def test_pipelines_of_every_family_have_their_tokens(name, kind, folder_of):
    """A word is at its places in all encoders that the denoiser reads in a row."""
    groups = ("words", "rest", "padding")  # T5 has no begin, Gemma no end
    groups += {"flux": ("end",), "pixart_sigma": ("end",), "sana": ()}.get(name, ("begin", "end"))
    model = loaded(folder_of(name), ("word:circle", *groups), kind)
    given = settings(scheduler=type(model.pipe.scheduler).__name__)
    one = Lesion("all", "", model.anatomy.paths, replacements.describe("zero", {}))
    cell = Cell(model.identity, Prompt("a red circle!"), 0, given, one)
    places = token_places(model, [cell])
    (of,) = places.of
    sets = [of[COND, one] for one in groups]
    assert sorted(column for columns in sets for column in columns) == list(range(places.length))  # each in one set
    encoders = 2 if name in ("sd3", "hunyuan_dit") else 1
    assert 6 * encoders <= len(of[COND, "word:circle"]) <= 7 * encoders  # letters, and a space in front of them
    plainly = images(model, "word:circle", texts=["a red circle!"], strength=0.0)
    for replacement in ("zero", "mask"):
        lesioned = images(model, "word:circle", replacement, texts=["a red circle!"])
        assert np.isfinite(lesioned).all() and not np.array_equal(lesioned, plainly), replacement


def test_sets_of_tokens_by_name(folder_of):
    words = in_parts([(loaded(folder_of("sd")).pipe.tokenizer, 30), (loaded(folder_of("sd")).pipe.tokenizer, 30)],
                     "A red circle, and two")  # fmt: skip
    found = {
        "begin": (0, 30), "end": (18, 48), "padding": (*range(19, 30), *range(49, 60)), "rest": (11, 41),
        "word:red": (2, 3, 4, 32, 33, 34), "word:red/1": (3, 33), "word:red/9": KeyError,
        "re:^t": (15, 16, 17, 45, 46, 47), "position:7": (7,), "aspect:colour": KeyError, "word:a dog": KeyError,
    }  # fmt: skip
    for name, expected in found.items():
        if expected is KeyError:
            with pytest.raises(KeyError):
                columns_of(words, name)
        elif expected:
            assert columns_of(words, name) == expected, name
    assert parse_tokens(["word:Red  Circle#2", " end", "position:007"]) == ("word:red circle#2", "end", "position:7")
    assert parse_tokens(None) == ("words", "padding")
    check_texts(["a red circle", "two blue stars"], ["aspect:colour", "re:a|o", "padding"])


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: asked(["colour"]), "layers.tokens: got 'colour'; allowed: begin, words, rest, end, padding, word:"),
        (lambda: asked(["end", "end"]), "layers.tokens: names 'end' twice"),
        (lambda: asked(["word:red", "word:RED"]), "layers.tokens: names 'word:red' twice"),
        (lambda: asked(["re:a+"]), "layers.tokens: 're:a.' has a +"),
        (lambda: asked(["re:("]), "layers.tokens: 're:.' is no regular expression"),
        (lambda: asked(["position:" + "1" * 5000]), "layers.tokens: got 'position:1111"),
        (lambda: asked(["word:red/" + "1" * 5000]), "layers.tokens: got 'word:red/1111"),
        (lambda: check_texts(["red"], ["word:red#" + "1" * 5000]), "layers.tokens: 'red#1111.* is not in 'red'"),
        (lambda: asked(["word:red circle/0"]), "layers.tokens: got 'word:red circle/0'"),
        (lambda: asked(["end"], by="attention"), "layers.tokens: needs layers.by=token or attention_token; allowed"),
        (lambda: asked(None, "feed_forward"), "layers.kind: got feed_forward; allowed with .*_token: cross"),
        (lambda: replacements.check("mean", "cross_attention", ["both"], "token"),
         "replacement: mean does not suit single tokens; allowed with layers.by=token: donor_prompt, double, mask, n"),
        (lambda: replacements.check("mask", "cross_attention", ["both"]), "replacement: mask .*: layers.by=token"),
        (lambda: replacements.check("donor_prompt", "text_to_image", ["both"], "token"),
         "replacement: donor_prompt suits layers.kind=cross_attention only; got text_to_image"),
        (lambda: check_texts(["a red circle", "two stars", "a star"], ["aspect:colour"]),
         "layers.tokens: aspect:colour: 'two stars' .*; so of 2 of 3 prompts, also 'a star'; each prompt must have"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(refused, words):
    with pytest.raises(RequestError, match=words):
        refused()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["layers.tokens=[word:dog]"], ["layers.tokens: 'dog' is not in 'a red circle'; its words: a, red, circle"]),
        (["layers.tokens=[word:dog]", "branch=uncond"], ["branch: 'dog' is not in ''"]),
        (["attribution=gradients", "selection=leave_one_out", "replacement=mask"],
         ["replacement: mask has no strength that gradients can be taken of; with attribution: double, zero"]),
        (["performance.compile=true"], ["performance.compile: does not work with layers.by=token"]),
        (["layers.component=[text_encoder,denoiser]", "replacement=null_prompt"],
         ["replacement: null_prompt suits the denoiser only; with text_encoder: double, mask, zero"]),
        (["layers.component=vae"], ["layers.by: vae has no token; allowed with it: attention, transformer_block"]),
    ],
)  # fmt: skip
def test_wrong_requests_are_one_line_and_write_nothing(cli, given, words):
    code, _, err = cli("prompts.items=[a red circle]", "layers.include=null", "layers.by=token", *given)
    assert code == 2 and all(word in err for word in words), err
    assert len(err.strip().splitlines()) == 1
    assert not list(cli.folder.rglob("*.parquet")) and not (cli.folder / "store").exists()


def test_rows_say_in_which_attention_tokens_are_lesioned():
    sides = ("text_encoder.tokens.padding", "denoiser.tokens.padding")
    zero = replacements.describe("zero", {})
    found = [kinds(Lesion("all", "", layers, zero)) for layers in (sides[:1], sides[1:], sides)]
    assert found == ["self_attention", "cross_attention", "self_attention+cross_attention"]
    of_joint = Lesion("all", "", sides, zero, kind="text_to_image")
    assert kinds(of_joint) == "self_attention+text_to_image"
    blocks = Lesion("all", "", ("text_encoder.encoder.layers.0", "mid_block.attentions.0"), zero, kind="block")
    assert kinds(blocks) == "block"


def test_a_study_from_the_command_line(cli):
    """Rows of one layer and several sets; a prompt that fills the encoder has no padding, and only its cells fail."""
    full = "a red circle" + " and a blue star" * 30
    code, _, err = cli(
        "layers.by=attention_token", "layers.tokens=['re:^red$',padding]", "layers.include=[mid_block*]",
        "replacement=[zero,mask]",
        f"prompts.items=[a red circle,{full}]", "generation.steps=1", "selection=leave_one_out",
    )  # fmt: skip
    assert code == 1, err
    (frame,) = cli.frames()
    mid = "mid_block.attentions.0.tokens."
    assert set(frame["layer"]) == {"", f"{mid}re:^red$", f"{mid}padding"}
    failed = frame[frame["status"] != "ok"]
    assert failed["layer"].tolist() == [f"{mid}padding"] * 2 and set(failed["prompt"]) == {full}
    assert failed["reason"].str.contains("padding: .* has no such tokens among its 77").all()
    assert frame[frame["status"] == "ok"].groupby("layer")["cell"].nunique()[f"{mid}re:^red$"] == 4


def test_maps_of_masked_layers_are_left_out(folder_of):
    """Values change nothing of where an image looks; keys do."""
    from lesion.generation.capture import Capturing
    from lesion.study.capture import Capture

    model = loaded(folder_of("sd"))
    layer = model.anatomy.layers[0].path
    capture = Capture(("down_blocks.0.attentions.0",))
    given = settings(steps=1)
    for name, dead in (("zero", 0), ("mask", 1)):
        one = Lesion("all", "", (layer,), replacements.describe(name, {}))
        assert len(Capturing(model, [Cell(model.identity, Prompt(TEXTS[0]), 0, given, one)], capture).dead[0]) == dead


def test_negative_prompts_have_tokens_of_their_own(folder_of):
    model = loaded(folder_of("sd"))
    one = Lesion("all", "", (model.anatomy.layers[0].path,), replacements.describe("zero", {}))
    given = settings(negative_prompt="no red")
    cell = Cell(model.identity, Prompt(TEXTS[0]), 0, given, one)
    (of,) = token_places(model, [cell]).of
    assert of == {(COND, WORD): (2, 3, 4), (UNCOND, WORD): (3, 4, 5)}
    lacking = dataclasses.replace(cell, settings=settings(), lesion=dataclasses.replace(one, branch="uncond"))
    with pytest.raises(ValueError, match="'' has no such word"):
        token_places(model, [lacking])


def of_encoder(folder, component, tokens=(WORD, "padding")):
    source = models.resolve(tiny_spec(folder))
    return examined(models.load(source, "cpu"), source, asked(list(tokens), component=component))


ENCODERS = [("sd", "text_encoder", "self_attn.v_proj"), ("sdxl", "text_encoder_2", "self_attn.v_proj"),
            ("sd3", "text_encoder_3", "layer.0.SelfAttention.v")]  # fmt: skip


@pytest.mark.parametrize(("name", "component", "leaf"), ENCODERS)
def test_values_in_a_text_encoder_are_a_plain_hook(name, component, leaf, folder_of):
    """What tokens bring to the others in the encoder's own attention; a prompt's features are its lesion's alone."""
    folder = folder_of(name)
    model = of_encoder(folder, component)
    layers = [path for path in model.components[component].paths if path.endswith(f".tokens.{WORD}")]
    stem = "encoder.block" if "SelfAttention" in leaf else "text_model.encoder.layers"
    columns = [list(range(2, 6)), list(range(8, 13))] if name == "sd3" else places_of(model, WORD)  # T5 spells spaces

    def hook(module, args, output):
        if torch.equal(args[0][0], args[0][1]):  # two empty negative prompts
            return None
        changed = output.clone()
        for row, of_row in enumerate(columns):
            changed[row, of_row] = 0
        return changed

    def on_values(pipe):
        encoder = getattr(pipe, component)
        return [(encoder.get_submodule(f"{stem}.{number}.{leaf}"), hook) for number in range(2)]

    ours = images(model, WORD, layers=layers)
    untouched = plain(folder, texts=TEXTS, seeds=SEEDS)
    assert np.abs(ours - plain(folder, on_values, texts=TEXTS, seeds=SEEDS)).max() < 1e-5
    assert np.abs(ours - untouched).max() > 1e-4
    assert np.array_equal(images(model, WORD, layers=layers, strength=0.0), untouched)
    assert np.array_equal(images(model, WORD, layers=layers), ours)


@pytest.mark.parametrize(("name", "component", "leaf"), ENCODERS)
@pytest.mark.parametrize("tokens", [WORD, "padding"])
def test_masked_keys_in_a_text_encoder_are_an_attention_mask(name, component, leaf, tokens, folder_of):
    """Transformers' own mask, given to every attention; of CLIP it is causal, too."""
    folder = folder_of(name)
    model = of_encoder(folder, component, (tokens,))
    encoder = getattr(pipeline(folder), component)
    length = 77 if "self_attn" in leaf else 256
    columns = places_of(model, tokens)
    if name == "sd3":  # T5 spells spaces
        read = model.pipe.tokenizer_3(list(TEXTS), padding="max_length", max_length=length)["attention_mask"]
        padding = [[place for place, one in enumerate(row) if not one] for row in read]
        columns = [list(range(2, 6)), list(range(8, 13))] if tokens == WORD else padding

    def give(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != length or torch.equal(hidden[0], hidden[1]):
            return None
        mask = torch.zeros(2, 1, length, length)
        if "self_attn" in leaf:
            mask += torch.full((length, length), -torch.inf).triu(1)
        for row, of_row in enumerate(columns):
            mask[row, :, :, of_row] = -torch.inf
        kwargs = {**kwargs, "attention_mask" if "self_attn" in leaf else "mask": mask}
        return args, kwargs

    attention = leaf.rpartition(".")[0]
    handles = [
        module.register_forward_pre_hook(give, with_kwargs=True)
        for path, module in encoder.named_modules()
        if path.endswith(f".{attention}")
    ]
    assert len(handles) == 2
    try:
        expected = plain(folder, texts=TEXTS, seeds=SEEDS)
    finally:
        for handle in handles:
            handle.remove()
    untouched = plain(folder, texts=TEXTS, seeds=SEEDS)
    ours = images(model, tokens, "mask", layers=model.components[component].paths, branch="cond")
    assert np.abs(ours - expected).max() < 2e-5
    assert np.abs(ours - untouched).max() > 1e-4
    none = images(model, tokens, "mask", layers=model.components[component].paths, branch="cond", strength=0.0)
    assert np.array_equal(none, untouched)


COLOURED = [
    "a red circle on a white background",
    "a blue star on a black background",
    "a green square",
    "a yellow ring",
]


SEVEN = range(7)


@pytest.mark.slow
def test_without_a_colour_word_colour_moves_and_shape_not_beyond_the_noise_floor(tmp_path, monkeypatch, no_report):
    """In all attention of the encoder and of the denoiser. The noise floor is how often what is read of the same prompt
    differs between seeds."""
    monkeypatch.chdir(tmp_path)
    study = lesion_package.study(
        "layers.by=token", "layers.component=[text_encoder,denoiser]", "layers.tokens=[aspect:colour]",
        "selection=all", "replacement=zero", "prompts=inline", f"prompts.items=[{','.join(COLOURED)}]",
        f"seeds={[*SEVEN]}", "generation.steps=10", "tracker=none",
    )  # fmt: skip
    frame = study.run(tmp_path / "run").frame
    assert frame["status"].eq("ok").all()
    rows = {name: frame[frame["selection"] == name] for name in ("none", "all")}
    seen = {}
    for name, part in rows.items():
        for one in part.itertuples():
            found = read_image(np.asarray(Image.open(tmp_path / "run" / one.image))).found
            things = frozenset(f.thing.colour for f in found), frozenset(f.thing.shape for f in found)
            seen[name, one.prompt, one.seed] = dict(zip(("colour", "shape"), things, strict=True))
    chances = {}
    for what in ("colour", "shape"):
        images = itertools.product(COLOURED, SEVEN)
        moved = [seen["all", *image][what] != seen["none", *image][what] for image in images]
        floor = [
            seen["none", text, one][what] != seen["none", text, other][what]
            for text in COLOURED
            for one, other in itertools.combinations(SEVEN, 2)
        ]
        table = [[sum(moved), len(moved) - sum(moved)], [sum(floor), len(floor) - sum(floor)]]
        chances[what] = fisher_exact(table, alternative="greater").pvalue
    assert chances["colour"] < 1e-6 and chances["shape"] > 0.05, chances
