"""Scores against independent references: open_clip by hand, scikit-image, and formulas in numpy."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import correlate

import lesion.scoring
from judges import small_tower, write_blip, write_dreamsim, write_yolos
from lesion.errors import RequestError
from lesion.scoring import (
    Metric,
    Scorer,
    ScorerError,
    ScorerSpec,
    Shot,
    _hub_models,
    check,
    identities,
    known_metrics,
    make_scorer,
    metric_class,
)
from lesion.scoring import _clip as clip_module
from lesion.scoring import _clip_weights as weights_module
from lesion.scoring import _embeddings as embeddings_module
from lesion.scoring import dino_similarity as dino_module
from lesion.study.boxes import Box

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "scorer").glob("*.yaml"))
WORDS = ["a", "red", "green", "blue", "circle", "square", "above", "below", "on", "white"]
CONTEXT = 12
JUDGES = {"perceptual": "dreamsim", "objects": "geneval", "questions": "vqa_score"}  # configs of one further metric


def write_clip(folder: Path) -> Path:
    """A random CLIP of a few thousand weights with a word-level tokenizer, in open_clip's `local-dir:` layout."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocabulary, merges, model_max_length=CONTEXT).save_pretrained(folder)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    text = {
        "context_length": CONTEXT,
        "vocab_size": len(vocabulary),
        "hf_tokenizer_name": "local",
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.4, 0.6]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision, text)
    # A fresh ResNet tower pools little but its biases: without this, all images would look alike to it.
    for name, parameter in model.visual.named_parameters():
        if "bn" in name and name.endswith("weight"):
            torch.nn.init.constant_(parameter, 3.0)
        elif "attnpool" in name and (name.endswith("bias") or "positional" in name):
            torch.nn.init.zeros_(parameter)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def fresh_models() -> None:
    clip_module._embedder.cache_clear()
    dino_module._embedder.cache_clear()


def spec(clip: Path | str, *metrics: str, **more: object) -> ScorerSpec:
    name = f"local-dir:{clip}" if isinstance(clip, Path) else clip
    return ScorerSpec(**{"name": "tiny", "clip_model": name, "clip_pretrained": None, "metrics": metrics, **more})


def picture(seed: int, height: int = 40, width: int = 40) -> np.ndarray:
    """Smooth blobs with a little noise, uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return np.clip(np.asarray(small) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def shots(number: int = 5, **size: int) -> list[Shot]:
    prompts = ["a red circle", "a blue square above a green circle"]
    return [
        Shot(f"cell{i}", picture(100 + i, **size), f"base{i % 2}", picture(i % 2, **size), prompts[i % 2])
        for i in range(number)
    ]


def test_clip_scores_equal_open_clip_by_hand(clip_folder: Path) -> None:
    given = shots(5, height=40, width=56)
    found = make_scorer(spec(clip_folder, "clip_similarity", "clip_text", batch_size=2), "cpu").score(given)

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    model.eval()
    for i, shot in enumerate(given):
        with torch.no_grad():
            x, y = (model.encode_image(preprocess(Image.fromarray(p))[None])[0] for p in (shot.image, shot.baseline))
            t = model.encode_text(tokenizer([shot.prompt]))[0]
        assert found["clip_similarity"][i] == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=2e-6)
        assert found["clip_text"][i] == pytest.approx(float(x @ t / (x.norm() * t.norm())), abs=2e-6)
    assert np.ptp(found["clip_similarity"]) > 1e-3
    assert np.ptp(found["clip_text"]) > 1e-3


def test_the_logit_of_a_word_is_that_of_zero_shot_classification(clip_folder: Path) -> None:
    given = shots(3)
    choices = ["red", "green", "pale blue"]
    named = {"clip_choice": {"model": f"local-dir:{clip_folder}", "choices": choices}}
    asked = spec(clip_folder, "clip_choice", options=named)
    (metric,) = asked.described
    assert metric.texts("A RED circle") == ["A RED circle", "A green circle", "A pale blue circle"]
    assert metric.texts("a pale blue redwood") == ["a pale blue redwood", "a red redwood", "a green redwood"]
    assert not metric.asks("a red circle left of a red square") and not metric.asks("a circle")
    (found,) = make_scorer(asked, "cpu").score(given).values()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    with torch.no_grad():
        images = torch.stack([preprocess(Image.fromarray(shot.image)) for shot in given])
        texts = tokenizer(["a red circle", "a green circle", "a pale blue circle"])
        features, words, scale = model.eval()(images, texts)
        chances = (scale * features @ words.T).double().softmax(dim=1)[:, 0]
    np.testing.assert_allclose(found[[0, 2]], torch.logit(chances)[[0, 2]], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found[1])  # a blue square above a green circle: of the three it has green alone


@pytest.mark.parametrize("choices", [None, ["red"], ["red", " Red"], ["red", 3], ["red", ""]])
def test_choices_are_two_words_at_least(clip_folder: Path, choices: object) -> None:
    options = {"model": f"local-dir:{clip_folder}", "choices": choices}
    with pytest.raises(RequestError, match="two different words or more") as error:
        check(spec(clip_folder, "clip_choice", options={"clip_choice": options}))
    assert error.value.key == "scorer.metrics.clip_choice.choices"


def test_the_distance_from_another_prompts_image_is_that_of_clip(clip_folder: Path) -> None:
    given = shots(3)
    named = {"donor_distance": {"model": f"local-dir:{clip_folder}", "prompt": "a blue star"}}
    scored = make_scorer(spec(clip_folder, "clip_similarity", "donor_distance", options=named), "cpu").score(given)
    np.testing.assert_allclose(scored["donor_distance"], 1 - scored["clip_similarity"], rtol=1e-12)


def test_baseline_and_untouched_images_score_exactly(clip_folder: Path) -> None:
    base = picture(1)
    given = [
        Shot("base", base, "base", base, "a red circle"),
        Shot("no-effect", base.copy(), "base", base, "a red circle"),
        Shot("lesion", picture(2), "base", base, "a red circle"),
    ]
    found = make_scorer(spec(clip_folder, "clip_similarity", "clip_text", "ssim", "psnr"), "cpu").score(given)
    assert found["clip_similarity"][:2].tolist() == [1.0, 1.0]
    assert found["clip_similarity"][2] < 0.9999
    assert found["ssim"][:2].tolist() == [1.0, 1.0]
    assert found["ssim"][2] < 0.9
    assert found["psnr"][:2].tolist() == [np.inf, np.inf]
    assert np.isfinite(found["psnr"][2])
    assert found["clip_text"][0] == found["clip_text"][1] != found["clip_text"][2]


def test_values_do_not_depend_on_order_or_batches(clip_folder: Path) -> None:
    given = shots(7)
    metrics = ("clip_similarity", "clip_text", "ssim", "psnr")
    whole = make_scorer(spec(clip_folder, *metrics), "cpu").score(given)
    clip_module._embedder.cache_clear()
    order = np.random.default_rng(0).permutation(7)
    other = make_scorer(spec(clip_folder, *metrics, batch_size=3), "cpu").score([given[i] for i in order])
    for column in whole:
        np.testing.assert_allclose(other[column], whole[column][order], rtol=0, atol=1e-5, err_msg=column)


def test_each_image_and_prompt_is_embedded_once(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"image": 0, "text": 0, "load": 0}
    load = clip_module.load

    def counting(*args: object) -> object:
        seen["load"] += 1
        model, preprocess, tokenizer = load(*args)  # type: ignore[arg-type]
        image, text = model.encode_image, model.encode_text

        def encode_image(x: torch.Tensor) -> torch.Tensor:
            seen["image"] += len(x)
            return image(x)

        def encode_text(x: torch.Tensor) -> torch.Tensor:
            seen["text"] += len(x)
            return text(x)

        model.encode_image, model.encode_text = encode_image, encode_text
        return model, preprocess, tokenizer

    monkeypatch.setattr(clip_module, "load", counting)
    given = shots(6)  # 6 images, 2 baselines, 2 prompts
    make_scorer(spec(clip_folder, "clip_similarity", "clip_text"), "cpu").score(given)
    assert seen == {"image": 8, "text": 2, "load": 1}
    make_scorer(spec(clip_folder, "clip_similarity"), "cpu").score(given[:3] + shots(7)[6:])
    assert seen == {"image": 9, "text": 2, "load": 1}


def test_memory_is_bounded_and_still_right(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = shots(6)
    scorer = make_scorer(spec(clip_folder, "clip_similarity", batch_size=2), "cpu")
    expected = scorer.score(given)["clip_similarity"]
    monkeypatch.setattr(embeddings_module, "KEPT", 3)
    np.testing.assert_allclose(scorer.score(given)["clip_similarity"], expected, atol=1e-6)
    np.testing.assert_allclose(scorer.score(given[::-1])["clip_similarity"], expected[::-1], atol=1e-6)
    assert len(scorer.metrics[0].embedder.images.kept) == 3  # type: ignore[attr-defined]


def test_half_precision_weights_are_computed_in_float32(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write_clip(tmp_path / "half")
    file = folder / "open_clip_model.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    scorer = make_scorer(spec(folder, "clip_similarity"), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = scorer.score(shots())["clip_similarity"]
    clip_module._embedder.cache_clear()
    plain = make_scorer(spec(folder, "clip_similarity"), "cpu").score(shots())["clip_similarity"]
    assert next(scorer.metrics[0].embedder.model.parameters()).dtype == torch.float32  # type: ignore[attr-defined]
    np.testing.assert_array_equal(under_autocast, plain)


def test_long_prompt_is_warned_about_once(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fits = "a red " * 5  # 10 words and two marks: exactly the context
    long = fits + "circle\x1b"
    base = picture(0)
    given = [Shot(f"c{i}", picture(i), "b", base, prompt) for i, prompt in enumerate([fits, long, long, "a"])]
    scorer = make_scorer(spec(clip_folder, "clip_text"), "cpu")
    with caplog.at_level(logging.WARNING):
        scorer.score(given[:1])
        assert not caplog.records
        scorer.score(given)
        scorer.score(given[::-1])
        scorer.metrics[0].embedder.texts.kept.clear()  # type: ignore[attr-defined]
        scorer.score(given)
    (record,) = caplog.records
    assert f"first {CONTEXT} tokens" in record.getMessage()
    assert "a red a red" in record.getMessage()
    assert "\x1b" not in record.getMessage()
    assert "\n" not in record.getMessage()


def test_psnr_by_formula() -> None:
    given = [*shots(3), *shots(2, height=24, width=48)]  # two sizes in one call
    found = make_scorer(spec("unused", "psnr", batch_size=2), "cpu").score(given)["psnr"]
    for value, shot in zip(found, given, strict=True):
        error = np.mean((shot.image.astype(float) - shot.baseline.astype(float)) ** 2)
        assert value == pytest.approx(10 * np.log10(255**2 / error), abs=1e-5)


def ssim_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 in float64, window mirrored at the edges without repeating the edge pixel."""
    at = np.arange(-5, 6)
    window = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(window, window)[:, :, None] / window.sum() ** 2
    x, y = x / 255, y / 255

    def mean(values: np.ndarray) -> np.ndarray:
        return correlate(values, window, mode="mirror")

    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))))


def test_ssim_by_formula() -> None:
    flat = np.full((40, 40, 3), 255, np.uint8)
    given = [*shots(3), *shots(2, height=24, width=48), Shot("flat", flat - np.uint8(9), "white", flat, "")]
    found = make_scorer(spec("unused", "ssim", batch_size=2), "cpu").score(given)["ssim"]
    for value, shot in zip(found, given, strict=True):
        assert value == pytest.approx(ssim_by_hand(shot.image, shot.baseline), abs=1e-9)
    assert found.min() < 0.5 < found.max()


def test_ssim_is_one_value_on_every_device() -> None:
    """By scipy on a CPU, by torchmetrics on CUDA: both on the same pixels here."""
    import torch

    from lesion.scoring import ssim

    flat = torch.full((1, 3, 24, 32), 250 / 255, dtype=torch.float64)
    noise = torch.rand(4, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = torch.cat([noise, flat, flat]), torch.cat([noise.flip(0), flat, flat * 0.99])
    found, reference = ssim._by_scipy(x, y), ssim._by_torchmetrics(x, y)
    assert abs(found - reference).max() < 1e-11
    assert found[4] == 1 and found.min() < 0.5


def test_ssim_and_psnr_equal_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    given = []
    for shot in shots(3, height=64, width=64):
        for pixels in (shot.image, shot.baseline):  # plain frames, since the libraries treat edges differently
            pixels[:12], pixels[-12:], pixels[:, :12], pixels[:, -12:] = 90, 90, 90, 90
        given.append(shot)
    found = make_scorer(spec("unused", "ssim", "psnr"), "cpu").score(given)
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True, "channel_axis": -1}
    for i, shot in enumerate(given):
        _, everywhere = metrics.structural_similarity(shot.baseline, shot.image, data_range=255, **how)
        assert found["ssim"][i] == pytest.approx(everywhere.mean(), abs=1e-7)
        assert found["psnr"][i] == pytest.approx(metrics.peak_signal_noise_ratio(shot.baseline, shot.image), abs=1e-5)


def one_line(error: pytest.ExceptionInfo[ScorerError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("scorer tiny: ")
    return message


def test_missing_weights_are_one_clear_line(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ScorerError) as error:
        make_scorer(spec(tmp_path / "nowhere", "clip_text"), "cpu")
    assert "nowhere" in one_line(error)
    assert "open_clip_config.json" in one_line(error)

    bare = write_clip(tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()  # open_clip itself would go on with random weights
    with pytest.raises(ScorerError, match="weights"):
        make_scorer(spec(bare, "clip_text"), "cpu")

    monkeypatch.setattr(weights_module, "EMBEDDED", tmp_path / "not-there")
    with pytest.raises(ScorerError) as error:
        make_scorer(spec("embedded", "clip_similarity"), "cpu")
    assert "train_embedded.py" in one_line(error)

    monkeypatch.setattr(weights_module, "hub_answers", lambda: False)
    monkeypatch.setattr(weights_module.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights_module.hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ScorerError) as error:
        make_scorer(spec("ViT-B-32-quickgelu", "clip_text", clip_pretrained="openai"), "cpu")
    assert "scorer.clip_pretrained" in one_line(error)
    assert "ViT-B-32-quickgelu" in one_line(error)
    assert not caplog.records
    assert not weights_module.hub.HF_HUB_OFFLINE

    with pytest.raises(ScorerError, match="ViT-B-32"):
        make_scorer(spec("ViT-B-23", "clip_text"), "cpu")
    with pytest.raises(ScorerError, match=r"neither a file nor one of .*openai"):
        make_scorer(spec("ViT-B-32", "clip_text"), "cpu")


def test_embedded_is_the_folder_in_the_package(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Path(lesion.scoring.__file__).parents[1] / "models" / "embedded" / "clip"
    assert expected == weights_module.EMBEDDED
    monkeypatch.setattr(weights_module, "EMBEDDED", clip_folder)
    ours, local = (make_scorer(spec(name, "clip_text"), "cpu") for name in ("embedded", clip_folder))
    np.testing.assert_array_equal(ours.score(shots())["clip_text"], local.score(shots())["clip_text"])


def test_identity_follows_the_weights_not_the_place(clip_folder: Path, tmp_path: Path) -> None:
    wanted = ("clip_similarity", "ssim")
    copy = tmp_path / "elsewhere" / clip_folder.name
    write_clip(copy)
    first = identities(spec(clip_folder, *wanted))
    assert identities(spec(copy, *wanted)) == first
    assert first["clip_similarity"].startswith("clip_similarity/1 (")
    assert first["ssim"] == "ssim/1"
    assert str(clip_folder) not in str(first)
    file = copy / "open_clip_model.safetensors"
    from safetensors.torch import load_file

    save_file({k: v * 2 if "text_projection" in k else v for k, v in load_file(file).items()}, file)
    assert identities(spec(copy, *wanted))["clip_similarity"] != first["clip_similarity"]


def write_dino(folder: Path, seed: int = 0) -> Path:
    """A random DINOv2 of a few thousand weights whose position table is smaller than the crop's 16 x 16 patches."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56))
    with torch.no_grad():  # fresh weights are so small that all images would look alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("models") / "dino")


def test_dino_scores_equal_transformers_by_hand(dino_folder: Path) -> None:
    from transformers import Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    given = [*shots(3, height=40, width=57), *shots(2, height=300, width=512)]
    scorer = make_scorer(spec("unused", "dino_similarity", dino_model=str(dino_folder), batch_size=2), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scorer.score(given)["dino_similarity"]

    published = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    for value, shot in zip(found, given, strict=True):
        pixels = published([Image.fromarray(shot.image), Image.fromarray(shot.baseline)], return_tensors="pt")
        np.testing.assert_allclose(dino_module.preprocess(shot.image), pixels["pixel_values"][0], atol=1e-6)
        with torch.no_grad():
            x, y = model(**pixels).pooler_output
        assert value == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=2e-6)
    assert np.ptp(found) > 1e-3


def test_dino_of_an_unchanged_image_is_exactly_one_and_each_image_is_embedded_once(dino_folder: Path) -> None:
    base = picture(1)
    given = [Shot("same", base.copy(), "base", base, ""), Shot("other", picture(2), "base", base, "")]
    scorer = make_scorer(spec("unused", "dino_similarity", dino_model=str(dino_folder)), "cpu")
    found = scorer.score(given)["dino_similarity"]
    assert found[0] == 1.0
    assert found[1] < 0.9999
    assert len(scorer.metrics[0].embedder.images.kept) == 2  # type: ignore[attr-defined]


def test_dino_identity_follows_the_weights_not_the_place(dino_folder: Path, tmp_path: Path) -> None:
    def named(folder: Path) -> str:
        return identities(spec("unused", "dino_similarity", dino_model=str(folder)))["dino_similarity"]

    first = named(dino_folder)
    assert first.startswith("dino_similarity/1 (dino ")
    assert str(dino_folder) not in first
    assert named(write_dino(tmp_path / "copy" / "dino")) == first
    assert named(write_dino(tmp_path / "other" / "dino", seed=1)) != first


def test_a_missing_dino_is_one_line_that_names_the_key(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: object) -> str:
        with pytest.raises(RequestError) as error:
            check(spec("unused", "dino_similarity", dino_model=str(name)))
        assert "\n" not in str(error.value)
        assert error.value.key == "scorer.dino_model"
        return str(error.value)

    check(spec("unused", "dino_similarity", dino_model=str(dino_folder)))
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    assert "model.safetensors" in refused(tmp_path / "bare")
    odd = write_dino(tmp_path / "odd")
    (odd / "config.json").write_text('{"model_type": "vit"}')
    assert "is of vit; allowed: dinov2" in refused(odd)
    monkeypatch.setattr(_hub_models.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(_hub_models, "hub_answers", lambda: False)
    assert "hub's cache" in refused("facebook/dinov2-base")
    with pytest.raises(ScorerError, match="hub's cache"):
        identities(spec("unused", "dino_similarity"))


def test_a_dino_with_half_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write_dino(tmp_path / "half")
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layer.1" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ScorerError, match="weights lack"):
        make_scorer(spec("unused", "dino_similarity", dino_model=str(folder)), "cpu")


def test_a_dino_in_the_hubs_cache_is_taken_from_there(
    dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(dino_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert dino_module.resolve("org/tiny") == (snapshot / "config.json", snapshot / "model.safetensors")


@pytest.fixture(scope="module")
def preference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of transformers with its preprocessing and a tokenizer of bytes, as PickScore's folder has them."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from conftest import byte_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("models") / "pick", byte_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 32, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(20)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pick_scores_are_the_logits_of_transformers_clip(preference_folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    given = [*shots(2, height=40, width=57), *shots(1, height=64, width=32)]
    asked = spec("unused", "pick_score", options={"pick_score": {"model": str(preference_folder)}}, batch_size=2)
    found = make_scorer(asked, "cpu").score(given)["pick_score"]
    model = CLIPModel.from_pretrained(preference_folder).eval()
    images = AutoImageProcessor.from_pretrained(preference_folder)([shot.image for shot in given], return_tensors="pt")
    texts = [shot.prompt for shot in given]
    tokens = AutoTokenizer.from_pretrained(preference_folder)(
        texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**images, **tokens).logits_per_image.diagonal()
    np.testing.assert_allclose(found, logits, atol=2e-5)
    assert np.ptp(found) > 1e-3
    assert identities(asked)["pick_score"].startswith("pick_score/1 (pick ")


def test_a_missing_preference_model_is_one_line(preference_folder: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "the folder needs config.json, preproc")):
        with pytest.raises(RequestError, match=words) as error:
            check(spec("unused", "pick_score", options={"pick_score": {"model": str(folder)}}))
        assert error.value.key == "scorer.metrics.pick_score.model" and "\n" not in str(error.value)


def test_lpips_without_weights_says_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    import lesion.scoring.lpips as lpips

    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    lpips._net.cache_clear()
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ScorerError) as error:
        make_scorer(spec("unused", "lpips"), "cpu")
    assert str(tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth") in one_line(error)


def random_features(net: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """Random layers of a network's layout, and those whose outputs LPIPS compares (Zhang et al. 2018, section 3)."""
    import torchvision

    torch.manual_seed(0)
    if net == "alex":
        return torchvision.models.alexnet(weights=None).features, (1, 4, 7, 9, 11)  # relu1 to relu5
    if net == "vgg":
        return torchvision.models.vgg16(weights=None).features, (3, 8, 15, 22, 29)  # the last relu of each block
    return torchvision.models.squeezenet1_1(weights=None).features, (1, 4, 7, 9, 10, 11, 12)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_by_formula(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learned weights are torchmetrics' own; the network is random, but of the right layout."""
    from torchmetrics.functional.image import lpips as reference

    import lesion.scoring.lpips as lpips

    features, compared = random_features(net)
    asked = []
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda name, pretrained: asked.append(name) or features)
    lpips._net.cache_clear()
    given = [*shots(3, height=64, width=64), Shot("b", picture(0), "b", picture(0), "")]
    options = {} if net == "alex" else {"lpips": {"net": net}}
    scorer = make_scorer(spec("unused", "lpips", batch_size=2, options=options), "cpu")
    found = scorer.score(given)["lpips"]
    lpips._net.cache_clear()

    assert asked == [{"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[net]]
    assert identities(spec("unused", "lpips", options=options)) == {"lpips": f"lpips/1 ({net})"}
    weights = torch.load(Path(reference.__file__).parent / "lpips_models" / f"{net}.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    for value, shot in zip(found[:3], given, strict=False):
        x, y = (
            ((torch.from_numpy(p).float() / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None]
            for p in (shot.image, shot.baseline)
        )
        total = 0.0
        with torch.no_grad():
            for number, module in enumerate(features):
                x, y = module(x), module(y)
                if number in compared:
                    fx, fy = (f / (f.pow(2).sum(1, keepdim=True) + 1e-8).sqrt() for f in (x, y))
                    layer = compared.index(number)
                    total += float((weights[f"lin{layer}.model.1.weight"] * (fx - fy) ** 2).sum(1).mean())
        assert value == pytest.approx(total, rel=1e-4)
        assert value > 1e-5
    assert found[3] == 0.0


def test_each_metric_keeps_the_facts_it_states(
    clip_folder: Path, dino_folder: Path, preference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamsim.feature_extraction import load_open_clip_as_dino as loading
    from torchmetrics.functional.image import lpips as reference

    import lesion.scoring.lpips as lpips

    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *args, **kwargs: random_features("alex")[0])
    lpips._net.cache_clear()
    near = picture(1, height=64, width=64)
    far = 255 - near
    little = near.copy()
    little[:8, :8] ^= 1
    prompt = "a small red circle above a blue star on a white background"
    boxed = {"boxes": (Box("red circle", (0.0, 0.0, 0.5, 0.5)),), "box_mass": 0.25}
    given = [Shot("a", near.copy(), "b", near, prompt, **boxed), Shot("c", little, "b", near, prompt, **boxed)]
    given += [Shot("d", far, "b", near, prompt, **boxed)]
    monkeypatch.setattr(loading, "vit_base", small_tower)
    (tmp_path / "m.json").write_text(json.dumps([{"prompt": prompt, "include": [{"class": "bench", "count": 1}]}]))
    judges = {"detector": str(write_yolos(tmp_path / "yolos")), "metadata": str(tmp_path / "m.json")}
    options = {
        "clip_choice": {"model": f"local-dir:{clip_folder}", "choices": ["red", "green", "yellow"]},
        "donor_distance": {"model": f"local-dir:{clip_folder}", "prompt": "a blue star"},
        "pick_score": {"model": str(preference_folder)},
        "dreamsim": {"folder": str(write_dreamsim(tmp_path / "dreamsim")), "kind": "open_clip_vitb32"},
        "geneval": {**judges, "model": f"local-dir:{clip_folder}"},
        "vqa_score": {"model": str(write_blip(tmp_path / "blip"))},
    }
    every = spec(clip_folder, *known_metrics(), dino_model=str(dino_folder), options=options)
    found = make_scorer(every, "cpu").score(given)
    lpips._net.cache_clear()
    assert found.keys() == set(known_metrics()) == set(identities(every))
    for name in known_metrics():
        facts, (same, close, other) = metric_class(name), found[name]
        low, high = facts.range
        assert facts.name == name
        assert low <= min(found[name]) and max(found[name]) <= high, name
        if facts.direction == "similarity":
            assert same == facts.identical >= close > other, name
        elif facts.direction == "distance":
            assert same == facts.identical <= close < other, name
        else:
            assert facts.identical is None, name
            assert facts.why_unsuited(), name
    assert [name for name in known_metrics() if not metric_class(name).why_unsuited()] == [
        "clip_similarity",
        "dino_similarity",
        "ssim",
    ]


def test_the_table_of_metrics_in_the_docs_is_what_they_state() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    said = {row[0].strip("`"): row[1:] for row in table}
    assert sorted(said) == list(known_metrics())
    for name, (direction, values, identical, options, models) in said.items():
        facts = metric_class(name)
        low, high = facts.range
        assert (direction, values) == (facts.direction, f"{low:g} to {high:g}")
        assert identical == ("" if facts.identical is None else f"{facts.identical:g}")
        assert options == ", ".join(f"`{option}`" for option in facts.options())
        assert models == facts.models


def test_metrics_are_found_by_module_name_without_torch() -> None:
    read = [f"read_{one}" for one in ("background", "binding", "colour", "count", "relation", "shape", "size")]
    boxes = ("box_iou", "box_mass", "box_success")
    clip = ("clip_choice", "clip_similarity", "clip_text")
    others = ("dino_similarity", "donor_distance", "dreamsim", "geneval", "lpips", "pick_score", "psnr")
    assert known_metrics() == (*boxes, *clip, *others, *read, "ssim", "unsteered_distance", "vqa_score")
    code = "import sys, lesion.scoring as s; s.known_metrics(); print({'torch', 'open_clip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_facts_identities_and_what_prompts_ask_are_known_without_torch() -> None:
    code = (
        "import sys, lesion.scoring as s\n"
        "named = ('clip_choice', 'dino_similarity', 'donor_distance', 'dreamsim')\n"
        "named += ('geneval', 'pick_score', 'vqa_score')\n"
        "names = [n for n in s.known_metrics() if n not in named]\n"
        "spec = s.ScorerSpec('x', 'embedded', None, tuple(names))\n"
        "s.check(spec), s.identities(spec), s.columns_for(spec, 'a red circle')\n"
        "[s.metric_class(n).why_unsuited() for n in s.known_metrics()]\n"
        "print({'torch', 'open_clip', 'transformers', 'torchmetrics', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def config(metrics: object, **more: object) -> dict[str, object]:
    """The config's `scorer` as plain data."""
    values = {"name": "tiny", "clip_model": "embedded", "clip_pretrained": None, "importance": "clip_similarity"}
    return {**values, "batch_size": 64, "dino_model": "facebook/dinov2-base", "metrics": metrics, **more}


def test_names_and_names_with_options_say_the_same(dino_folder: Path) -> None:
    names = ["clip_similarity", "dino_similarity", "lpips"]
    old = ScorerSpec.of(config(names, dino_model=str(dino_folder)))
    for metrics in (
        {"clip_similarity": {}, "dino_similarity": {"model": str(dino_folder)}, "lpips": {"net": "alex"}},
        ["clip_similarity", {"dino_similarity": {"model": str(dino_folder)}}, {"lpips": None}],
        {"clip_similarity": {"model": "embedded"}, "dino_similarity": {"model": str(dino_folder)}, "lpips": {}},
    ):
        new = ScorerSpec.of(config(metrics))
        assert new.metrics == old.metrics == tuple(names)
        assert identities(new) == identities(old)
    other = ScorerSpec.of(config({"clip_similarity": {}, "lpips": {"net": "vgg"}}))
    assert identities(other)["lpips"] == "lpips/1 (vgg)"
    assert ScorerSpec.of(config("clip_similarity")).metrics == ("clip_similarity",)


@pytest.mark.parametrize(
    ("metrics", "key", "says"),
    [
        ({"clip_similarity": {}, "lpips": {"nett": "vgg"}}, "scorer.metrics.lpips", "'nett'; allowed: net"),
        ({"clip_similarity": {}, "lpips": {"net": "vgg19"}}, "scorer.metrics.lpips.net", "alex, vgg, squeeze"),
        ({"clip_similarity": {}, "ssim": {"sigma": 2}}, "scorer.metrics.ssim", "'sigma'; allowed: none"),
        (
            {"clip_similarity": {"model": 3}},
            "scorer.metrics.clip_similarity.model",
            "got 3; allowed: a value",
        ),
        ({"clip_similarity": {}, "lpips": "vgg"}, "scorer.metrics.lpips", "got 'vgg'; allowed: {option: value}"),
        (["clip_similarity", {"lpips": {}, "ssim": {}}], "scorer.metrics", "one `name: options`"),
        (["clip_similarity", "lpips", {"lpips": {"net": "vgg"}}], "scorer.metrics", "names 'lpips' twice"),
        (["clip_similarity", 3], "scorer.metrics", "got 3; allowed: box_iou, box_mass"),
        (["clip_similarity", {"taste": {}}], "scorer.metrics", "got 'taste'; allowed: box_iou, box_mass"),
        ([], "scorer.metrics", "is empty; allowed: one or more of box_iou, box_mass"),
        ({"ssim": {}}, "scorer.metrics", "must name clip_similarity"),
    ],
)
def test_wrong_metrics_are_refused_with_what_is_allowed(metrics: object, key: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        ScorerSpec.of(config(metrics))
    assert error.value.key == key
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_model_is_refused_under_the_key_that_names_it(tmp_path: Path) -> None:
    nowhere = {"model": str(tmp_path / "nowhere")}
    for metrics, key in (
        ({"clip_similarity": {}, "dino_similarity": nowhere}, "scorer.metrics.dino_similarity.model"),
        ({"clip_similarity": {"model": "local-dir:/nowhere"}}, "scorer.metrics.clip_similarity.model"),
        (
            {"clip_similarity": {"model": "ViT-B-32", "pretrained": "none"}},
            "scorer.metrics.clip_similarity.pretrained",
        ),
    ):
        with pytest.raises(RequestError) as error:
            check(ScorerSpec.of(config(metrics)))
        assert error.value.key == key


def test_a_new_metric_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brightness.py").write_text(
        "import numpy as np\n"
        "from lesion.scoring import Metric\n"
        "class Brightness(Metric):\n"
        "    direction, range = 'property', (0.0, 255.0)\n"
        "    def identity(self): return 'brightness/1'\n"
        "    def __call__(self, shots): return np.array([shot.image.mean() for shot in shots])\n"
    )
    monkeypatch.setattr(lesion.scoring, "__path__", [*lesion.scoring.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "lesion.scoring.brightness", None)
    monkeypatch.delitem(sys.modules, "lesion.scoring.brightness")
    assert "brightness" in known_metrics()
    scorer = make_scorer(spec("unused", "brightness", "psnr"), "cpu")
    assert scorer.columns == ("brightness", "psnr")
    given = shots(2)
    assert scorer.score(given)["brightness"].tolist() == [shot.image.mean() for shot in given]
    assert scorer.score(given, only=["brightness"]).keys() == {"brightness"}
    assert identities(spec("unused", "brightness", "psnr")) == {"brightness": "brightness/1", "psnr": "psnr/1"}


@pytest.mark.parametrize(
    ("metrics", "more", "says"),
    [
        (
            ("ssim", "sim"),
            {},
            "unknown metric sim; allowed: box_iou, box_mass",
        ),
        (("_clip",), {}, "unknown metric _clip"),
        ((), {}, "at least one"),
        (("ssim", "ssim"), {}, "distinct"),
        (("ssim",), {"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_specs_are_refused(metrics: tuple[str, ...], more: dict[str, object], says: str) -> None:
    with pytest.raises(ScorerError) as error:
        make_scorer(spec("unused", *metrics, **more), "cpu")
    assert says in one_line(error)


def test_wrong_shots_and_values_are_refused() -> None:
    good = picture(0)
    for bad in (good.astype(np.float32), good[..., 0], good[:20]):
        with pytest.raises(ValueError, match="cell"):
            Shot("cell", bad, "base", good, "")

    class Short(Metric):
        name, direction, range = "short", "property", (0.0, 1.0)

        def identity(self) -> str:
            return "short/1"

        def __call__(self, shots: object) -> np.ndarray:
            return np.zeros(1)

    with pytest.raises(ValueError, match="short"):
        Scorer([Short()]).score(shots(2))


def test_no_shots_give_empty_columns() -> None:
    found = make_scorer(spec("unused", "ssim", "psnr"), "cpu").score([])
    assert {column: values.shape for column, values in found.items()} == {"ssim": (0,), "psnr": (0,)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_the_spec(path: Path) -> None:
    values = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}
    assert {*values, "options"} == {field.name for field in fields(ScorerSpec)}
    assert values["name"] == path.stem
    assert values["importance"] in values["metrics"]
    assert ScorerSpec.of(values).name == path.stem
    own = [metric for metric in values["metrics"] if not metric.startswith("read_")]
    # The reader knows the toy world only.
    assert (own != list(values["metrics"])) == (values["clip_model"] == "embedded")
    if path.stem == "dino":
        assert (values["importance"], values["dino_model"]) == ("dino_similarity", "facebook/dinov2-base")
        assert own == ["clip_similarity", "dino_similarity"]
    elif path.stem in JUDGES:
        assert JUDGES[path.stem] in own
    else:
        assert own == ["clip_similarity", "clip_text", "ssim", "psnr"]
    if values["clip_model"] != "embedded":
        assert weights_module.resolve(values["clip_model"], values["clip_pretrained"])
        weights = open_clip.get_pretrained_cfg(values["clip_model"], values["clip_pretrained"])
        assert weights.get("quick_gelu", False) == ("quickgelu" in values["clip_model"])


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"embedded", "openclip_vit_b32", "openclip_vit_l14", "openclip_vit_h14"}
