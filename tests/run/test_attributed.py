"""attribution=gradients from the command line: what is made, what is written, and what is refused."""

from __future__ import annotations

import html
import json
import weakref

import pandas as pd
import pytest
import torch
from scipy import stats

from lesion.attribution import estimate as estimating
from lesion.cli import report
from lesion.config.schema import AttributionConf
from lesion.errors import RequestError
from lesion.models import memory
from lesion.report.attribution import certificate_lines
from lesion.study.attribution import Attribution
from lesion.study.lesions import Lesion, Replacement

ASKED = ["attribution=gradients", "attribution.top=2", "attribution.sample=2", "window=[[0,0.5],[0.5,1]]",
         "scorer.metrics=[clip_similarity,clip_text,{clip_choice:{choices:[circle,stars]}},"
         "{donor_distance:{prompt:two stars}}]"]  # fmt: skip


def test_a_study_of_six_lesions_makes_four_and_certifies_the_rest(cli, monkeypatch):
    code, out, err = cli(*ASKED, "dry_run=true")
    assert code == 0, err
    assert "6 lesions estimated from gradients of 2 images" in out and "the complete grid is 14 images" in out
    assert "to make: 10" in out

    code, out, err = cli(*ASKED)
    assert code == 0, err
    folder = cli.newest()
    table, results = pd.read_parquet(folder / "attribution.parquet"), pd.read_parquet(folder / "results.parquet")
    told = json.loads((folder / "certificate.json").read_text())
    assert len(table) == 6 and table["lesioned"].sum() == 4 and (table["estimate"] > 0).all()
    assert table["chosen"].value_counts().to_dict() == {"": 2, "top": 2, "sample": 2}
    assert set(table.loc[table["rank"] <= 2, "chosen"]) == {"top"}
    assert (table["low"] <= table["estimate"]).all() and (table["estimate"] <= table["high"]).all()
    made = table[table["lesioned"]].set_index(["layer", "window_start"])
    rows = results[results["selection"] == "leave_one_out"]
    real = 1 - rows.groupby(["layer", "window_start"])["clip_similarity"].mean()
    pd.testing.assert_series_equal(made["real"], real, check_names=False, check_like=True)
    text = rows.merge(results[results["selection"] == "none"], on="prompt_id")
    assert text["donor_distance_y"].notna().sum() == 4  # of one of the two prompts
    for name in ("clip_text", "clip_choice", "donor_distance"):
        change = (text[f"{name}_x"] - text[f"{name}_y"]).groupby([text["layer_x"], text["window_start_x"]]).mean()
        for place, value in change.items():
            assert made.loc[place, f"{name}_real"] == pytest.approx(value)
        assert table[f"{name}_estimate"].notna().all() and table[f"{name}_estimate"].nunique() > 1
        assert {"spearman", "kendall", "same_sign"} < told["signed"][name].keys()
        of, real = told["signed"][name], table.loc[table["lesioned"], f"{name}_real"].abs()
        is_top = table.loc[table["lesioned"], "chosen"] == "top"
        assert of["threshold"] == pytest.approx(real[is_top].median()) and of["important_found"] == 1
        seen = int((real[~is_top] >= of["threshold"]).sum())
        assert of["important_sampled"] == seen and seen <= of["missed"] <= 4 - (2 - seen)
        assert f"change of {name}: Spearman" in out
        assert f"at most {of['missed']} of the 4 others change it by {of['threshold']:.2g} or more" in out
    assert told["signed"]["donor_distance"]["prompts"] == 1 and told["signed"]["clip_text"]["prompts"] == 2
    assert told["identical_at_zero"] is True and told["lesions"] == 6
    assert told["grid"]["images"] == 14 and told["made"]["images"] == 10 and told["share_of_grid"]["in_all"] > 0
    assert f"Spearman {told['spearman']['value']:.2f}" in out and "at most" in out
    assert {path.name for path in (folder / "tables").glob("attribution*")} == {"attribution.csv", "attribution.md"}
    assert (folder / "figures" / "attribution.png").stat().st_size > 1000

    import lesion.run.job as job

    def refuse(*args, **more):
        raise AssertionError("nothing is left to make")

    loaded = job.loaded
    monkeypatch.setattr(job, "loaded", refuse)  # the same estimates, images and certificate, without a model
    code, _, err = cli(*ASKED, "attribution.checkpointing=true")
    assert code == 0, err
    again = cli.newest()
    assert again != folder and json.loads((again / "certificate.json").read_text()) == told
    pd.testing.assert_frame_equal(pd.read_parquet(again / "attribution.parquet"), table)

    monkeypatch.setattr(
        job, "loaded", loaded
    )  # the same estimates; of four candidates each is made on one prompt first
    code, out, err = cli(*ASKED, "attribution.candidates=4")
    assert code == 0, err
    third = cli.newest()
    table, told = pd.read_parquet(third / "attribution.parquet"), json.loads((third / "certificate.json").read_text())
    assert set(table.nlargest(4, "estimate").index) == set(table.index[table["screened"] == 1])
    assert set(table.loc[table["rank"] <= 2, "chosen"]) == {"top"} and table["lesioned"].sum() == 4
    assert (table["adjusted"].rank(ascending=False) == table["rank"]).all()
    assert told["candidates"]["images"] == 4 and told["held_out"]["prompts"] == 1
    assert "4 images of candidates rank them" in out and "by 1 prompt on which no candidate was" in out
    results = pd.read_parquet(third / "results.parquet")
    assert len(results) == 10  # two baselines, and four lesions on both prompts: none of one prompt alone
    code, out, _ = cli(*ASKED, "attribution.candidates=4", "dry_run=true")
    assert "candidates lesioned to rank them: 4 on 1 prompt; at most 4 images more" in out
    monkeypatch.setattr(job, "loaded", refuse)
    code, _, err = cli(*ASKED, "attribution.mean=geometric", "attribution.candidates=4", "dry_run=true")
    assert code == 0, err  # another mean of the same estimates
    assert cli(*ASKED, "attribution.candidates=4")[0] == 0
    assert json.loads((cli.newest() / "certificate.json").read_text()) == told


def tokens(by):
    return ["attribution=gradients", "attribution.top=2", "attribution.sample=2", f"layers.by={by}",
            "layers.tokens=['re:^(red|stars)$',padding,end,begin,words]", "generation.steps=1"]  # fmt: skip


def test_sets_of_tokens_are_estimated_and_certified(cli):
    code, out, err = cli(*tokens("token"), "layers.include=null")
    assert code == 0, err
    folder = cli.newest()
    table, told = pd.read_parquet(folder / "attribution.parquet"), json.loads((folder / "certificate.json").read_text())
    names = ["re:^(red|stars)$", "padding", "end", "begin", "words"]
    assert table["layer"].tolist() == [f"denoiser.tokens.{name}" for name in names]
    assert (table["estimate"] > 0).all() and table["lesioned"].sum() == 4 and told["identical_at_zero"] is True
    assert "attribution of 5 lesions by gradients, certified by 4 that were made" in out


def test_gradients_that_do_not_fit_are_taken_of_fewer_images(cli, monkeypatch):
    asked = ["attribution=gradients", *ASKED[1:4], "generation.steps=2"]
    code, _, err = cli(*asked)
    assert code == 0, err
    whole = pd.read_parquet(cli.newest() / "attribution.parquet")["estimate"]
    estimate, release, held, seen = estimating.estimate, memory.release, [], []

    def crowded(model, lesions, batch, *rest):
        if len(batch) > 1:
            kept = torch.zeros(3)
            held.append(weakref.ref(kept))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return estimate(model, lesions, batch, *rest)

    monkeypatch.setattr(estimating, "estimate", crowded)
    monkeypatch.setattr(memory, "release", lambda device: seen.append(held[-1]()) or release(device))
    assert cli(*asked, "store.dir=another")[0] == 0
    assert seen == [None]  # what the failed call took is let go of before memory is given back
    halves = pd.read_parquet(cli.newest() / "attribution.parquet")["estimate"]
    assert halves.to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-3)


def test_the_page_of_an_attribution_says_what_it_is(cli, drawn):
    code, out, err = cli(*tokens("attention_token"), "layers.include=[mid_block.*]")
    assert code == 0, err
    folder = cli.newest()
    table, told = pd.read_parquet(folder / "attribution.parquet"), json.loads((folder / "certificate.json").read_text())
    assert table["layer"].str.startswith("mid_block.attentions.0.tokens.").all() and len(table) == 5
    first, *others = certificate_lines(told)
    assert all(line in out for line in (first, *others))
    markdown = (folder / "tables" / "attribution.md").read_text()
    assert "mid_block.attentions.0.tokens.re:^(red\\|stars)$" in markdown
    page = html.unescape((folder / "report.html").read_text())
    assert all(line.strip()[1:] in page for line in (first, *others)) and "layers are ranked among these 4" in first
    assert report.main([str(folder)]) == 0  # made again, it says the same, and keeps the table
    assert html.unescape((folder / "report.html").read_text()) == page
    assert (folder / "tables" / "attribution.md").read_text() == markdown


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("probes", 0, "must be a whole number from 1 to 10000; got 0"),
        ("probes", 10**12, "must be a whole number from 1 to 10000; got 1000000000000"),
        ("points", [0.1] * 101, "has 101 numbers; allowed: up to 100"),
        ("points", [0, 2], "must be a number in [0, 1], or a list of such; got [0, 2]"),
        ("candidates", 10, "must be 0, or more than attribution.top (10); got 10"),
        ("threshold", 3, "must be null or a number in (0, 2); got 3"),
        ("view", "pixels", "got 'pixels'; allowed: clip, latent"),
        ("mean", "median", "got 'median'; allowed: root, geometric"),
        ("signed", [3], "must be null or names of metrics; got [3]"),
    ],
)
def test_values_that_are_refused(key, value, words):
    config = vars(AttributionConf(name="gradients")) | {key: value}
    with pytest.raises(RequestError) as refused:
        Attribution.of(config)
    assert str(refused.value) == f"attribution.{key}: {words}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attribution.top=6"], "attribution.top: the study has 6 lesions"),
        (["selection=[leave_one_out,only_one]"], "selection: attribution is for leave_one_out alone"),
        (["layers.by=token", "replacement=mean"], "replacement: mean does not suit single tokens; allowed with"),
        (["replacement=null_prompt"], "replacement: null_prompt has no strength that gradients can be taken of"),
        (["strength=0.5"], "strength: attribution is of whole lesions"),
        (["capture=maps"], "capture: does not go with attribution=gradients; allowed with it: none"),
        (["shard.count=2"], "shard.count: does not go with donor_distance; allowed with it: 1"),
        (["shard.count=2", "scorer.metrics=[clip_similarity]"], "shard.count: does not go with attribution=gradients"),
        (["scorer.metrics=[clip_similarity,{donor_distance:{prompt:a dog}}]"],
         "scorer.metrics.donor_distance.prompt: got 'a dog'; allowed: a prompt of the study, word for word"),
        (["scorer.metrics=[clip_similarity,clip_choice]"], "scorer.metrics.clip_choice.choices: got []; allowed: two"),
        (["scorer.metrics=[clip_similarity,ssim,clip_text]", "attribution.signed=ssim"],
         "attribution.signed: got 'ssim'; allowed: those of scorer.metrics that have gradients (clip_text)"),
        (["scorer.metrics=[clip_similarity,ssim]", "scorer.importance=ssim"], "scorer.importance: attribution"),
    ],
)  # fmt: skip
def test_what_is_refused(cli, overrides, words):
    given = {override.split("=")[0] for override in overrides}
    code, _, err = cli(*(one for one in ASKED if one.split("=")[0] not in given), *overrides)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not list(cli.folder.iterdir())


def test_chosen_are_the_highest_and_a_sample_that_the_seed_decides():
    lesions = [Lesion("leave_one_out", str(n), (str(n),), Replacement("zero")) for n in range(30)]
    ranking = [float((7 * n) % 30) for n in range(30)]
    top, sample = Attribution(top=4, sample=5).chosen(lesions, ranking)
    assert [ranking[place] for place in top] == [29, 28, 27, 26]
    assert len({*sample} - {*top}) == 5 and (top, sample) == Attribution(top=4, sample=5).chosen(lesions, ranking)
    samples = [Attribution(top=4, sample=5, seed=seed).chosen(lesions, ranking)[1] for seed in range(300)]
    drawn = [place for sample in samples for place in sample]
    counts = [drawn.count(place) for place in range(30) if place not in top]
    assert stats.chisquare(counts).pvalue > 1e-3  # every other lesion is as likely
