"""Optional metrics on tiny models of the classes that they load, against transformers, peft's formula and by hand."""

from __future__ import annotations

import json
import math
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from judges import (
    LABELS,
    small_tower,
    write_blip,
    write_chat,
    write_dreamsim,
    write_dreamsim_of_dinov2,
    write_mask2former,
    write_yolos,
)
from lesion.errors import RequestError
from lesion.scoring import ScorerError, ScorerSpec, Shot, _objects, _vqa, check, identities, make_scorer
from lesion.scoring import dreamsim as dreamsim_module
from lesion.scoring._objects import Seen
from lesion.scoring._vqa import Question, spellings
from lesion.scoring.geneval import Asked, Clause, GenEval, correct, crop, places
from lesion.scoring.vqa_score import VqaScore


def picture(seed: int, height: int = 40, width: int = 40) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST))


def shot(seed: int, prompt: str) -> Shot:
    return Shot(f"c{seed}", picture(seed), "b", picture(99), prompt)


def asked(metric: str, **options: object) -> ScorerSpec:
    return ScorerSpec("tiny", "embedded", None, (metric,), options={metric: options})


def refused(metric: str, **options: object) -> RequestError:
    with pytest.raises(RequestError) as error:
        check(asked(metric, **options))
    assert "\n" not in str(error.value)
    return error.value


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return write_blip(tmp_path_factory.mktemp("judges") / "blip")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return write_chat(tmp_path_factory.mktemp("judges") / "chat")


def test_spellings_of_an_answer():
    assert spellings("Yes") == ["Yes", " Yes", "yes", " yes"]
    assert spellings("four") == ["four", " four", "Four", " Four", "4", " 4"]
    assert spellings("4") == ["4", " 4", "four", " four", "Four", " Four"]


def test_vqa_scores_of_blip_are_the_probabilities_that_it_generates_with(blip):
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model, processor = BlipForQuestionAnswering.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    scorer = make_scorer(asked("vqa_score", model=str(blip)), "cpu")
    given = [shot(1, "a red circle"), shot(2, "a blue square")]
    found = scorer.score(given)["vqa_score"]
    for one, value in zip(given, found, strict=True):
        question = f'Does this figure show "{one.prompt}"? Please answer yes or no.'
        inputs = processor(images=one.image, text=question, return_tensors="pt")
        told = model.generate(**inputs, max_new_tokens=2, output_scores=True, return_dict_in_generate=True)
        first, second = (torch.softmax(score[0].double(), dim=-1) for score in told.scores)
        (yes,) = processor.tokenizer("yes", add_special_tokens=False).input_ids
        assert value == pytest.approx(float(first[yes]), rel=1e-4)
        # An answer of two words has the probability of both; what comes out is likeliest.
        two = told.sequences[0, -2:].tolist()
        answer = Question(question, processor.decode(two))
        assert scorer.metrics[0].answerer(one.image, answer) == pytest.approx(
            float(first[two[0]] * second[two[1]]), rel=1e-4
        )
    assert abs(found[0] / found[1] - 1) > 1e-3
    assert identities(asked("vqa_score", model=str(blip)))["vqa_score"].startswith("vqa_score/1 (blip ")


def test_vqa_scores_of_a_chat_model_sum_the_spellings_of_the_first_token(chat):
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    model, processor = Qwen2VLForConditionalGeneration.from_pretrained(chat), Qwen2VLProcessor.from_pretrained(chat)
    ids = processor.tokenizer.convert_tokens_to_ids
    answerer = _vqa.answerer(chat, "cpu", "float32")
    for text, choices, more, answer, forms in (
        ("is this red?", ("yes", "no"), " Answer with one of: yes, no.", "yes", ("yes", "Yes")),
        ("how many circles?", (), " Answer in one word.", "four", ("four", "4")),
        ("red? Please answer yes or no.", (), "", "Yes", ("yes", "Yes")),
    ):
        said = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}{more}<|im_end|>\n"
        inputs = processor(text=[f"{said}<|im_start|>assistant\n"], images=[picture(1)], return_tensors="pt")
        told = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        shares = torch.softmax(told.scores[0][0].double(), dim=-1)
        expected = sum(float(shares[ids(form)]) for form in forms)
        found = answerer(picture(1), Question(text, answer, choices))
        # A spelling behind a space or with another capital is several letters to this tokenizer, and adds its product.
        assert expected * (1 - 1e-4) <= found < expected * 1.01 + 1e-5
    two = "red circle"
    space = processor.tokenizer(two).input_ids
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([space])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        every = torch.log_softmax(model(**inputs).logits[0, -len(space) - 1 : -1].double(), dim=-1)
    whole = float(every[range(len(space)), space].sum().exp())
    assert whole * (1 - 1e-4) <= answerer(picture(1), Question(text, two)) <= whole * 1.2


def test_questions_of_a_file_are_meant_over(blip, tmp_path):
    tifa = [
        {"id": 1, "caption": "a red circle", "question": "is this a circle?", "choices": ["yes", "no"],
         "answer": "yes", "element_type": "shape"},
        {"id": 1, "caption": "a red circle", "question": "how many?", "choices": ["one", "two"], "answer": "one"},
        {"id": 2, "caption": "a blue square", "question": "what is the colour?", "answer": "blue"},
    ]  # fmt: skip
    (tmp_path / "tifa.json").write_text(json.dumps(tifa))
    pairs = {"prompt": "a red circle", "vqa_list": [["is this a circle?", "yes"], ["how many?", "one"]]}
    (tmp_path / "geneval2.jsonl").write_text(json.dumps(pairs) + "\n")
    given = [shot(1, "a red circle"), shot(2, "a green star"), shot(3, " a blue square ")]
    values = {}
    for name, mean in (("tifa.json", "arithmetic"), ("geneval2.jsonl", "arithmetic"), ("tifa.json", "geometric")):
        options = {"model": str(blip), "questions": str(tmp_path / name), "mean": mean}
        metric = VqaScore.of(options, "scorer.metrics.vqa_score")
        metric.check()
        metric.load("cpu", 4)
        values[name, mean] = metric(given)
        assert [metric.asks(one.prompt) for one in given] == [True, False, name == "tifa.json"]
    each = [metric.answerer(given[0].image, Question(q, a, c)) for q, a, c in (
        ("is this a circle?", "yes", ("yes", "no")), ("how many?", "one", ("one", "two")))]  # fmt: skip
    found = values["tifa.json", "arithmetic"]
    assert found[0] == pytest.approx(np.mean(each)) and np.isnan(found[1]) and 0 < found[2] < 1
    assert values["tifa.json", "geometric"][0] == pytest.approx(math.sqrt(each[0] * each[1]))
    assert values["geneval2.jsonl", "arithmetic"][0] == pytest.approx(np.mean(each))
    kept = [VqaScore(str(blip), str(tmp_path / file)).identity() for file in ("tifa.json", "geneval2.jsonl")]
    assert len({*kept, VqaScore(str(blip)).identity(), VqaScore(str(blip), dtype="bfloat16").identity()}) == 4


def test_a_vqa_model_or_file_that_cannot_be_is_one_line(blip, chat, tmp_path):
    nowhere = refused("vqa_score", model=str(tmp_path / "none"))
    assert nowhere.key == "scorer.metrics.vqa_score.model" and "no such folder" in str(nowhere)
    for change, told in (
        (lambda place: (place / "model-00002-of-00006.safetensors").unlink(), "lacks model-00002"),
        (lambda place: (place / "model.safetensors.index.json").write_text("{}"), "no index of weights"),
        (lambda place: (place / "chat_template.jinja").unlink(), "no chat template"),
        (lambda place: (place / "config.json").write_text('{"architectures": ["Dinov2Model"]}'), "is of Dinov2Model"),
        (lambda place: (place / "config.json").write_text("{}"), "is of no model"),
        (lambda place: (place / "config.json").write_text("[1]"), "config.json holds no mapping"),
        (lambda place: (place / "config.json").write_text("[" * 100_000), "config.json is no valid JSON"),
    ):
        place = tmp_path / str(abs(hash(told)))
        place.mkdir()
        for file in chat.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        change(place)
        assert told in str(refused("vqa_score", model=str(place)))
    for rows, told in (
        ([{"caption": "a", "answer": "b"}], "entry 1 needs a question and an answer"),
        ([{"question": "a", "answer": "b"}], "entry 1 needs a text under one of caption"),
        ([{"prompt": "a", "vqa_list": ["b"]}], "vqa_list must be a list"),
        ([{"prompt": "a", "question": "a", "answer": "b", "choices": "c"}], "choices must be a list"),
        ({"a": 1}, "must hold a list"),
    ):
        (tmp_path / "wrong.json").write_text(json.dumps(rows))
        wrong = refused("vqa_score", model=str(blip), questions=str(tmp_path / "wrong.json"))
        assert wrong.key == "scorer.metrics.vqa_score.questions" and told in str(wrong)
    assert "no such file" in str(refused("vqa_score", model=str(blip), questions=str(tmp_path / "none.json")))
    assert "must have {prompt}" in str(refused("vqa_score", model=str(blip), question="Is it good?"))
    with pytest.raises(ScorerError, match="cannot load"):
        make_scorer(asked("vqa_score", model=str(tmp_path / "none")), "cpu")


def seen(x: float, y: float, width: float = 10, height: float = 10, score: float = 0.9) -> Seen:
    return Seen(score, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def test_where_an_object_lies_to_another():
    """Centres apart by more than a tenth of both sizes, in directions that are more than half of the distance."""
    middle = seen(50, 50)
    assert places(seen(20, 50), middle) == {"left of"} and places(middle, seen(20, 50)) == {"right of"}
    assert places(seen(50, 20), middle) == {"above"} and places(seen(50, 80), middle) == {"below"}
    assert places(seen(80, 80), middle) == {"right of", "below"}  # 28/42.4 each way
    assert places(seen(51.9, 50), middle) == set()  # 0.1 * (10 + 10) = 2
    assert places(seen(53, 50), middle) == set()  # (3 - 2)/3 = 1/3
    assert places(seen(54.5, 50), middle) == {"right of"}  # 2.5/4.5
    assert places(seen(60, 50, width=90), middle) == set()  # 0.1 * (90 + 10) = 10


def test_what_geneval_calls_correct():
    apples, bench = [seen(20, 20), seen(40, 20)], [seen(20, 60)]
    found = {"apple": apples, "bench": bench}
    right = {id(apples[0]): "red", id(apples[1]): "green", id(bench[0]): "blue"}

    def judge(*include: Clause, exclude: tuple[Clause, ...] = ()) -> float:
        return correct(Asked(include, exclude, False), found, lambda own, name: [right[id(one)] for one in own])

    assert judge(Clause("apple", 2)) == judge(Clause("apple", 1), Clause("bench", 1)) == 1
    assert judge(Clause("apple", 3)) == judge(Clause("apple", 1), Clause("cat", 1)) == 0
    assert judge(Clause("apple", 2), exclude=(Clause("apple", 3),)) == 1
    assert judge(Clause("apple", 1), exclude=(Clause("apple", 2),)) == 0
    assert judge(Clause("apple", 1, "red"), Clause("bench", 1, "blue")) == 1
    assert judge(Clause("apple", 2, "red")) == 0  # the second is green
    assert judge(Clause("apple", 1, "green")) == 0  # the best alone is looked at
    assert judge(Clause("bench", 1), Clause("apple", 1, place=("above", 0))) == 1
    assert judge(Clause("bench", 1), Clause("apple", 2, place=("above", 0))) == 1
    assert judge(Clause("bench", 1), Clause("apple", 2, place=("right of", 0))) == 0
    assert judge(Clause("cat", 1), Clause("apple", 1, place=("above", 0))) == 0  # nothing to lie above


def test_a_crop_is_grey_around_the_mask():
    image = picture(0, 8, 8)
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:4, 1:5] = True
    mask[2, 1] = False
    part = crop(image, Seen(1.0, (1, 2, 5, 4), mask))
    assert part.shape == (2, 4, 3) and (part[0, 0] == 0x99).all()
    assert (part[1] == image[3, 1:5]).all()
    assert (crop(image, Seen(1.0, (-3.0, 6.6, 1.2, 30.0))) == image[7:8, 0:1]).all()
    assert crop(image, Seen(1.0, (8.0, 8.0, 8.0, 8.0))).shape == (1, 1, 3)


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory) -> Path:
    return write_mask2former(tmp_path_factory.mktemp("judges") / "mask2former")


@pytest.fixture(scope="module")
def yolos(tmp_path_factory) -> Path:
    return write_yolos(tmp_path_factory.mktemp("judges") / "yolos")


def test_objects_are_the_queries_of_mask2former_with_class_and_mask_scores(mask2former):
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    image = picture(4, 64, 96)
    found = _objects.detector(mask2former, "cpu")(image, 0.15)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    with torch.no_grad():
        out = model(**AutoImageProcessor.from_pretrained(mask2former)(images=image, return_tensors="pt"))
    shares = out.class_queries_logits[0].softmax(-1)[:, :-1].flatten()
    masks = torch.nn.functional.interpolate(out.masks_queries_logits, size=(384, 384), mode="bilinear")[0]
    expected: dict[str, list[float]] = {}
    for place in shares.topk(6).indices.tolist():  # as many as there are queries
        inside = masks[place // 3] > 0
        score = float(shares[place] * masks[place // 3].sigmoid()[inside].mean()) if inside.any() else 0.0
        if score > 0.15:
            name = LABELS[place % 3]
            expected.setdefault({"mouse": "computer mouse"}.get(name, name), []).append(score)
    assert expected and found.keys() == expected.keys()
    for name, several in found.items():
        assert [one.score for one in several] == pytest.approx(sorted(expected[name], reverse=True), abs=1e-4)
        for one in several:
            rows, columns = np.nonzero(one.mask)
            assert one.mask.shape == (64, 96)
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert _objects.detector(mask2former, "cpu")(image, 0.999) == {}


def write_metadata(folder: Path, rows: list[dict[str, object]]) -> str:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "metadata.jsonl")


def test_geneval_judges_what_the_detector_sees_and_clip_calls_by_colour(yolos, tmp_path, monkeypatch):
    rows = [
        {"tag": "counting", "include": [{"class": "apple", "count": 2}], "prompt": "two apples"},
        {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "red"}], "prompt": "a red apple"},
    ]
    metadata = write_metadata(tmp_path, rows)
    spec = asked("geneval", detector=str(yolos), metadata=metadata, model="embedded")
    check(spec)
    (metric,) = make_scorer(spec, "cpu").metrics
    assert isinstance(metric, GenEval) and metric.asks("two apples") and not metric.asks("a star")
    limits = []
    red, blue = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255

    def objects(image, limit):
        limits.append(limit)
        return {"apple": [seen(4, 4, 8, 8)] * (2 if image[0, 0, 0] else 1)}

    real = metric.objects
    monkeypatch.setattr(metric, "objects", objects)
    given = [Shot("a", image, "b", red, row["prompt"]) for row in rows for image in (red, blue)]
    given.append(Shot("a", red, "b", red, "a star"))
    assert metric(given).tolist()[:3] == [1, 0, 1] and np.isnan(metric(given)[4])
    assert limits[:4] == [0.9, 0.9, 0.3, 0.3]
    # A colour is the likeliest of ten by three phrases.
    phrases = ("a photo of a {} apple", "a photo of a {}-colored apple", "a photo of a {} object")
    names = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    vectors = [metric.embedder.texts([p.format(n) for p in phrases], 3).mean(axis=0) for n in names]
    vectors = np.array([vector / np.linalg.norm(vector) for vector in vectors])
    best = [names[int((vectors @ metric.embedder.images([image], 1)[0]).argmax())] for image in (red, blue)]
    assert [metric.colours(image, [seen(4, 4, 8, 8)], "apple")[0] for image in (red, blue)] == best
    # What YOLOS itself sees, by its own probabilities.
    model, picture_ = real.model, picture(5)
    with torch.no_grad():
        out = model(**real.processor(images=picture_, return_tensors="pt"))
    scores, labels = out.logits[0].softmax(-1)[:, :-1].max(-1)
    for number, name in LABELS.items():
        expected = sorted(scores[(labels == number) & (scores > 0.2)].tolist(), reverse=True)
        found = real(picture_, 0.2).get({"mouse": "computer mouse"}.get(name, name), [])
        assert [one.score for one in found] == pytest.approx(expected, abs=1e-5)
    assert real(picture_, 0.2)


def test_a_geneval_that_cannot_be_is_one_line(yolos, blip, tmp_path):
    row = {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "an apple"}
    fine = {"detector": str(yolos), "metadata": write_metadata(tmp_path, [row]), "model": "embedded"}
    for change, option, told in (
        ({"metadata": ""}, "metadata", "needs GenEval's evaluation_metadata.jsonl"),
        ({"metadata": str(tmp_path / "none.jsonl")}, "metadata", "no such file"),
        ({"detector": str(tmp_path / "none")}, "detector", "no such folder"),
        ({"detector": str(blip)}, "detector", "is of BlipForQuestionAnswering"),
        ({"threshold": 2}, "threshold", "allowed: a number in"),
        ({"model": "local-dir:/none"}, "model", "none"),
    ):
        error = refused("geneval", **{**fine, **change})
        assert error.key.endswith(option) and told in str(error)
    apple = row["include"][0]
    for include, told in (
        ([{"class": "zebra"}], "does not know 'zebra'"),
        ([{**apple, "count": 0}], "count must be a whole number"),
        ([{**apple, "color": "mauve"}], "got the color 'mauve'"),
        ([{**apple, "position": ["above", 0]}], "an earlier object"),
        ([3], "needs a class"),
        ([], "include must be a list"),
    ):
        metadata = write_metadata(tmp_path, [{**row, "include": include}])
        assert told in str(refused("geneval", **{**fine, "metadata": metadata}))


@pytest.fixture(scope="module")
def dreamsim_folder(tmp_path_factory) -> Path:
    return write_dreamsim(tmp_path_factory.mktemp("judges") / "dreamsim")


def adapted(state: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A, for each block's attention."""
    found = load_file(adapter / "adapter_model.safetensors")
    for name in state:
        if name.endswith("attn.qkv.weight"):
            lora = f"base_model.model.extractor_list.0.model.{name.removesuffix('.weight')}"
            state[name] = state[name] + 0.5 * found[f"{lora}.lora_B.weight"] @ found[f"{lora}.lora_A.weight"]
    return state


def dreamsim_by_hand(shots: list[Shot], embed, mean: list[float], std: list[float]) -> list[float]:
    """embed: of pixels (1, 3, 224, 224), scaled by mean and std."""

    def centred(image: np.ndarray) -> torch.Tensor:
        large = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.asarray(large) / np.float32(255)) - torch.tensor(mean)) / torch.tensor(std)
        with torch.no_grad():
            vector = embed(pixels.permute(2, 0, 1)[None])
        return vector - vector.mean()

    pairs = [(centred(one.image), centred(one.baseline)) for one in shots]
    return [1 - float(torch.cosine_similarity(*pair, dim=0)) for pair in pairs]


def dreamsim_of(folder: Path, kind: str, shots: list[Shot]) -> np.ndarray:
    spec, place = asked("dreamsim", folder=str(folder), kind=kind), torch.hub.get_dir()
    check(spec)
    found = make_scorer(spec, "cpu").score(shots)["dreamsim"]
    dreamsim_module._embedder.cache_clear()
    assert torch.hub.get_dir() == place
    assert identities(spec)["dreamsim"].startswith(f"dreamsim/1 ({kind} ")
    return found


DREAMT = [shot(1, ""), shot(2, ""), Shot("a", picture(3), "b", picture(3), "")]


def test_dreamsim_is_its_tower_with_the_adapter_added(dreamsim_folder, monkeypatch):
    from dreamsim.feature_extraction import load_open_clip_as_dino as loading

    monkeypatch.setattr(loading, "vit_base", small_tower)
    found = dreamsim_of(dreamsim_folder, "open_clip_vitb32", DREAMT)
    state = torch.load(dreamsim_folder / "open_clip_vitb32_pretrain.pth.tar", weights_only=True)["state_dict"]
    tower = small_tower()
    tower.pos_drop = torch.nn.LayerNorm(16)
    projection = state.pop("proj")
    tower.load_state_dict(adapted(state, dreamsim_folder / "open_clip_vitb32_single_lora"))
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = dreamsim_by_hand(DREAMT[:2], lambda pixels: (tower.eval()(pixels) @ projection)[0], mean, std)
    np.testing.assert_allclose(found[:2], expected, atol=1e-5)
    assert min(expected) > 1e-3 and found[2] == 0


def test_dreamsim_of_dinov2_reads_what_torch_hub_left(tmp_path, monkeypatch, capfd):
    """The embedding is the class token behind the last block, in front of the final LayerNorm."""
    folder = write_dreamsim_of_dinov2(tmp_path / "dreamsim")

    def offline(*args: object, **options: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    found = dreamsim_of(folder, "dinov2_vitb14", DREAMT)
    assert capfd.readouterr() == ("", "")
    tower = small_tower(patch_size=14, depth=12).eval()
    state = torch.load(folder / "checkpoints" / "dinov2_vitb14_pretrain.pth", weights_only=True)
    tower.load_state_dict(adapted(state, folder / "dinov2_vitb14_single_lora"))
    seen: list[torch.Tensor] = []
    tower.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        tower(pixels)
        return seen.pop()[0, 0]

    expected = dreamsim_by_hand(DREAMT[:2], embed, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    np.testing.assert_allclose(found[:2], expected, atol=1e-4)  # twelve blocks amplify what floats round off
    assert min(expected) > 1e-3 and found[2] == 0
    (folder / "facebookresearch_dinov2_main" / "hubconf.py").unlink()
    told = refused("dreamsim", folder=str(folder), kind="dinov2_vitb14")
    assert "lacks facebookresearch_dinov2_main/hubconf.py of kind dinov2_vitb14" in str(told)


def test_a_dreamsim_that_cannot_be_is_one_line(dreamsim_folder, tmp_path, monkeypatch):
    for options, told in (
        ({}, "'' is no folder of DreamSim's weights; with network"),
        ({"folder": str(tmp_path)}, "lacks dino_vitb16_pretrain.pth of kind ensemble"),
        ({"folder": str(dreamsim_folder), "kind": "clip_vitb32"}, "lacks clip_vitb32_pretrain.pth.tar"),
    ):
        error = refused("dreamsim", **options)
        assert error.key == "scorer.metrics.dreamsim.folder" and told in str(error)
    monkeypatch.setattr(dreamsim_module.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lesion[dreamsim]'" in str(refused("dreamsim", folder=str(dreamsim_folder)))
