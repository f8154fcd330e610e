"""Overrides before Hydra reads them: files of prompts by any name, right quoting, choices of groups, flags anywhere."""

from __future__ import annotations

import re
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from lesion.config.compose import compose, overrides_of
from lesion.config.overrides import prepared, split
from lesion.config.parsing import parse
from lesion.config.reading import first_read
from lesion.errors import RequestError

NAMES = [
    *("a,b.csv", "a=b.csv", "[a].csv", "a & b!.csv", "提示词.csv", 'it\'s "x".csv', "a b", "${seeds}.csv", "~x.csv"),
    *("(a){b}:c.csv", "back\\slash.csv", "a'.tsv", "100%.tsv", "@.csv", "#1.csv", "-.csv"),
]


def test_a_file_of_prompts_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).write_text("prompt\na cat\n") if "." in name else (tmp_path / name).mkdir()
    (tmp_path / "a b" / "one.txt").write_text("a cat")
    for name in NAMES:
        config = compose([f"prompts={name}"])
        with open_dict(config):
            del config["hydra"]
        assert [prompt.text for prompt in parse(config).prompts] == ["a cat"], name
        for given, path in (
            ([f"prompts={tmp_path / name}"], str(tmp_path / name)),
            (overrides_of({"prompts": name}), name),
        ):
            *_, last = OverridesParser.create().parse_overrides(prepared(given))
            assert last.key_or_group == "prompts.path" and OmegaConf.create({"path": last.value()}).path == path
    calibration = compose(["prompts@calibration.prompts=a,b.csv"]).calibration.prompts
    assert calibration.path == "a,b.csv"
    assert prepared(["prompts=-"]) == ["prompts=file", "prompts.path='-'"]
    assert prepared(["prompts=x.csv,y.csv"]) == ["prompts=file", "prompts.path='x.csv','y.csv'"]  # a sweep
    assert prepared(["prompts='x y.csv'"]) == ["prompts=file", "prompts.path='x y.csv'"]
    assert prepared(["prompts=colour,shape"]) == ["prompts=colour,shape"]
    (tmp_path / "colour").touch()
    assert prepared(["prompts=colour"]) == ["prompts=colour"]  # a set of conf/prompts comes first


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prompts=colour,x.csv", ["prompts: ", "not both"]),
        (
            "prompts=a red circle",
            ["prompts: ", "no set or file", """prompts=inline 'prompts.items=["a red circle"]'"""],
        ),
        ("prompts=a circle, red!", ["prompts: ", "no set or file"]),
        ("prompts=[colour,shape]", ["prompts: takes one name", "-m prompts=colour,shape"]),
        ("model=[embedded,local]", ["model: takes one name", "-m model=embedded,local"]),
        ("model=[embedded,local],sd15", ["model: takes one name"]),
        ("scorer=[embedded,dino]", ["scorer: takes one name"]),
        ("tracker=[none,wandb]", ["tracker: takes one name"]),
        ("prompts@calibration.prompts=[colour,shape]", ["prompts: takes one name"]),
        ("model=5", ["model: ", "got 5", "embedded"]),
        ("model=null", ["model: ", "got None", "embedded"]),
        ("model={a: b}", ["model: ", "embedded"]),
        ("selection=[1]", ["selection: ", "got 1", "leave_one_out"]),
        ("generation.steps", ["command line: ", "KEY=VALUE"]),
        ("a b", ["command line: ", "KEY=VALUE"]),
    ],
)
def test_a_choice_that_would_not_mean_what_it_says_is_refused(override, words):
    with pytest.raises(RequestError) as refused:
        prepared([override])
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("prompts=nothere", "prompts: there is no set or file 'nothere'; allowed: background, boxes, calibration, "),
        ("model=sd16", "model: there is no choice 'sd16'; allowed: embedded, "),
        ("experiment=demos", "experiment: there is no choice 'demos'; allowed: "),
    ],
)
def test_a_name_that_no_group_has_is_refused_by_those_it_has(override, line):
    with pytest.raises(RequestError) as refused:
        compose([override])
    assert str(refused.value).startswith(line) and "pkg://" not in str(refused.value)


def test_one_name_in_a_list_is_that_name():
    assert prepared(["model=[embedded]", "selection=[all]"]) == ["model=embedded", "selection=[all]"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("generation.negative_prompt", "a cat & a dog!"),
        ("generation.negative_prompt", "x = [1"),
        ("generation.negative_prompt", "一只红色的猫"),
        ("generation.negative_prompt", "a \"b\" 'c'"),
        ("prompts.path", "a[1].csv"),
    ],
)
def test_text_that_needs_quotes_is_refused_with_the_right_quoting(key, text):
    with pytest.raises(RequestError) as refused:
        prepared([f"{key}={text}"])
    told, _, advice = str(refused.value).partition("; write ")
    assert told.startswith(f"{key}: ")
    (override,) = shlex.split(advice)  # as a shell hands it over
    group, name = key.split(".")
    assert compose(["prompts=inline", "prompts.items=[a]", override])[group][name] == text


def test_only_items_that_need_quotes_are_quoted():
    with pytest.raises(RequestError) as refused:
        prepared(["prompts.items=[a red circle, 两只猫, stop!]"])
    assert str(refused.value).endswith("""write 'prompts.items=[a red circle, "两只猫", "stop!"]'""")


def test_flags_may_stand_anywhere():
    assert split(["a=1", "-m", "b=2", "--config-dir", "x", "--cfg", "job", "~c", "--info"]) == (
        ["-m", "--config-dir", "x", "--cfg", "job", "--info", "all"],
        ["a=1", "b=2", "~c"],
    )
    assert split(["prompts=-", "--info", "searchpath"]) == (["--info", "searchpath"], ["prompts=-"])
    for wrong in (["a=1", "--mulitrun"], ["--config-dir"], ["-x", "a=1"]):
        with pytest.raises(RequestError, match=r"command line: .*lesion --help") as refused:
            split(wrong)
        assert "usage" not in str(refused.value)


def test_each_model_of_a_sweep_has_keys_of_its_own(cli, tiny_folder):
    own = [f"models.local.id={tiny_folder}", "models.local.name=mine", "models.local.steps=3"]
    common = ["model.name=other", "dry_run=true", "store.dir=s"]
    code, out, err = cli("-m", "model=embedded,local", *own, "models.embedded.steps=2", *common, defaults=False)
    assert code == 0, err
    assert re.findall(r"^study of (\w+):", out, re.M) == ["other", "mine"]
    assert re.findall(r"(\d+) x \d+ pixels .* (\d+) steps", out) == [("64", "2"), ("16", "3")]
    config = compose(["model=local", *own])
    assert (config.model.id, config.model.name, config.generation.steps) == (str(tiny_folder), "mine", 3)
    for wrong, words in {
        "models.local.id=F": "models.local: is for model=local; the model of this job is embedded",
        "models.lokal.id=F": "models.lokal: there is no such model; allowed: embedded, ",
        "models.embedded.idd=F": "idd",
        "models.embedded.steps=many": "steps",
        "models.embedded=3": "models.embedded: must be a mapping",
        "models=3": "models: must be a mapping",
    }.items():
        with pytest.raises(RequestError, match=words):
            compose([wrong])
    code, out, err = cli("-m", "model=embedded,local", "models.lokal.id=F", *common, defaults=False)
    assert (code, err.count("\n")) == (2, 1)
    assert "models.lokal" in err
    code, out, err = cli("-m", "model=embedded,local", *own, "models.sd15.id=F", *common, defaults=False)
    assert (code, err.count("\n")) == (2, 1)
    assert "models.sd15: is for model=sd15; the jobs' models: embedded, local" in err
    code, out, err = cli("-m", "model=embedded,local", f"model.id={tiny_folder}", *common, defaults=False)
    assert (code, err.count("\n")) == (2, 1)
    assert "model.id: would be the weights of embedded and of local; models.local.id=" in err


def test_true_and_false_are_no_numbers_wherever_they_come_from():
    config = compose([])
    with open_dict(config):
        del config["hydra"]

    def read(value):
        OmegaConf.update(config, "performance", {"compile": value})  # as YAML is merged
        return first_read(config)["performance"]["compile"]

    assert [read(value) for value in (True, False, 1, 0, "true", "off")] == [True, False, True, False, True, False]
    for wrong in (5, -1, 0.5, "perhaps", None, []):
        with pytest.raises(RequestError, match=r"^performance\.compile: must be true or false; got "):
            read(wrong)


def test_a_name_that_no_file_can_have_stays_a_name():
    """Of keys that may name a folder or a model on the hub; whoever opens it says what is wrong."""
    config = compose([f"{key}={'x' * 300}" for key in ("model.config", "scorer.dino_model", "scorer.clip_pretrained")])
    with open_dict(config):
        del config["hydra"]
    data = first_read(config)
    assert data["model"]["config"] == data["scorer"]["dino_model"] == data["scorer"]["clip_pretrained"] == "x" * 300
