"""Words of a prompt and their columns, under the tokenizers of every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import CLIPTokenizer

from conftest import byte_tokenizer
from lesion.generation.generate import say_unseen
from lesion.models import EMBEDDED
from lesion.models.words import encoders, in_parts
from lesion.study.prompts import Prompt
from lesion.study.words import named, words_in
from pipelines import bert_tokenizer, gemma_tokenizer, t5_tokenizer

TEXT = "A red circle, and a blue circle: café-bar"
NAMES = ["a", "red", "circle", "and", "a#2", "blue", "circle#2", "café-bar"]


class WithoutOffsets:
    """A tokenizer of the kind written in Python."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, return_offsets_mapping=False, **more):
        assert not return_offsets_mapping
        return self.tokenizer(text, **more)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "clip": CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer"),
        "bytes": byte_tokenizer(),
        "t5": t5_tokenizer(),
        "gemma": gemma_tokenizer(),
        "bert": bert_tokenizer(tmp_path_factory.mktemp("bert") / "bert"),
    }


def test_words_of_a_text_and_phrases_in_it():
    assert [word.name for word in words_in(TEXT)] == NAMES
    assert all(TEXT[word.start : word.end].lower() == word.plain for word in words_in(TEXT))
    assert named(TEXT, "circle") == ("circle",)
    assert named(TEXT, "blue Circle") == ("blue", "circle#2")
    assert named(TEXT, "a#2") == ("a#2",)
    for wrong in ("green", "red blue", "circle#3", "circle#x", ""):
        with pytest.raises(KeyError, match=r"its words: a, red, circle, and"):
            named(TEXT, wrong)


@pytest.mark.parametrize("name", ["clip", "bytes", "t5", "gemma", "bert"])
@pytest.mark.parametrize("offsets", [True, False])
def test_pieces_of_a_word_spell_it(name, offsets, tokenizers):
    tokenizer = tokenizers[name]
    words = in_parts([(tokenizer if offsets else WithoutOffsets(tokenizer), 60)], TEXT)
    ids = tokenizer(TEXT, padding="max_length", max_length=60, truncation=True, padding_side="right")["input_ids"]
    assert list(words.columns) == NAMES
    for word, columns in words.columns.items():
        spelt = tokenizer.decode([ids[column] for column in columns]).replace(" ", "").lower()
        assert spelt in (word.partition("#")[0], "cafe-bar"), word
    mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert list(words.special) == [at for at, special in enumerate(mask) if special]
    assert words.find("blue circle") == (*words.columns["blue"], *words.columns["circle#2"])
    assert words.unseen == ()


@pytest.mark.parametrize("offsets", [True, False])
def test_words_beyond_the_limit_are_named(offsets, tokenizers):
    clip = tokenizers["clip"] if offsets else WithoutOffsets(tokenizers["clip"])
    words = in_parts([(clip, 8)], TEXT)  # start, a red circle, and a, end
    assert list(words.columns) == ["a", "red", "circle", "and", "a#2"]
    assert words.unseen == ("blue", "circle#2", "café-bar")
    assert words.special == (0, 7)
    with pytest.raises(KeyError, match="beyond the limit"):
        words.find("blue")


def test_columns_of_encoders_in_a_row(tokenizers):
    """Of Stable Diffusion 3: CLIP's tokens, then T5's; a word that CLIP cuts off is seen by T5."""
    alone = [in_parts([(tokenizers[name], 60)], TEXT) for name in ("clip", "t5")]
    both = in_parts([(tokenizers["clip"], 8), (tokenizers["t5"], 60)], TEXT)
    assert both.length == 68
    assert both.columns["red"] == (*alone[0].columns["red"], *(8 + column for column in alone[1].columns["red"]))
    assert both.columns["blue"] == tuple(8 + column for column in alone[1].columns["blue"])
    assert both.unseen == ()
    without = in_parts([(tokenizers["clip"], 60), (None, 9)], TEXT)
    assert without.columns == alone[0].columns
    assert without.special[-9:] == tuple(range(60, 69))


def test_text_without_words(tokenizers):
    assert in_parts([(tokenizers["clip"], 8)], "").special == tuple(range(8))


def test_many_prompts_that_are_too_long_are_one_line(caplog):
    pipe = SimpleNamespace(tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=8))
    model = SimpleNamespace(pipe=pipe, arguments={}, unseen={})
    texts = ["circle " * (21 + number) for number in range(5)]
    say_unseen(model, [Prompt(text) for text in texts])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("5 of 5 prompts are too long: ") and said.endswith("; and 2 more (column truncated_tokens)")
    assert "its last 15 tokens (circle#7, " in said and "circle#21); of " in said
    assert [tokens for tokens, _ in model.unseen.values()] == [15, 16, 17, 18, 19]
    say_unseen(SimpleNamespace(pipe=SimpleNamespace(), arguments={}, unseen={}), [Prompt(texts[0])])  # cannot be told
    assert len(caplog.records) == 1


def test_a_pipeline_without_tokenizer_is_refused():
    with pytest.raises(ValueError, match="has no tokenizer"):
        encoders(SimpleNamespace())


LATE = "blue, circle#2, café-bar"


@pytest.mark.parametrize(
    ("name", "lengths", "absent", "unseen"),
    [
        ("StableDiffusionPipeline", {"tokenizer": 8}, (), LATE),
        ("StableDiffusionXLPipeline", {"tokenizer": 8, "tokenizer_2": 8}, (), LATE),
        ("StableDiffusionXLImg2ImgPipeline", {"tokenizer": None, "tokenizer_2": 8}, (), LATE),  # the refiner
        ("StableDiffusion3Pipeline", {"tokenizer": 8, "tokenizer_2": 8, "tokenizer_3": 60}, (), ""),
        ("StableDiffusion3Pipeline", {"tokenizer": 8, "tokenizer_3": 60}, ("text_encoder_3",), LATE),
        ("FluxPipeline", {"tokenizer": 8, "tokenizer_2": 60}, (), ""),
        ("FluxPipeline", {"tokenizer": 60, "tokenizer_2": 8}, (), LATE),  # of CLIP it reads no tokens
    ],
)
def test_words_that_no_encoder_sees_are_named_once_a_study(name, lengths, absent, unseen, caplog):
    """Of several encoders one that sees a word is enough; one that the pipeline lacks sees none."""
    limit = lengths.get("tokenizer_3") or lengths.get("tokenizer_2")

    def call(self, max_sequence_length=limit):
        raise NotImplementedError

    pipe = type(name, (SimpleNamespace,), {"__call__": call} if name.startswith(("StableDiffusion3", "Flux")) else {})()
    for part, length in lengths.items():
        tokenizer = length and CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer", model_max_length=length)
        encoder = part.replace("tokenizer", "text_encoder")
        vars(pipe).update({part: tokenizer, encoder: None if encoder in absent else "an encoder"})
    pipe.tokenizer_max_length = lengths["tokenizer"]
    model = SimpleNamespace(pipe=pipe, arguments={}, unseen={})
    for _ in range(2):  # studies
        say_unseen(model, [Prompt(TEXT), Prompt("a star"), Prompt(TEXT)])
    said = [record.getMessage() for record in caplog.records]
    whole = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")(TEXT)["input_ids"]
    cut = len(whole) - 8  # of the encoder that sees most, two of the 8 are its start and end
    line = f"1 of 2 prompts is too long: no text encoder sees of {TEXT!r}, its last {cut} tokens ({LATE})"
    assert said == ([line] * 2 if unseen else [])
    assert {text: tokens for text, (tokens, _) in model.unseen.items()} == {TEXT: cut if unseen else 0, "a star": 0}
