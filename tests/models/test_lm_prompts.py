"""What a language model reads and has to say: borders, special tokens, masks, lengths."""

from __future__ import annotations

from typing import Any

import pytest

from tests.editors.lm import model_of, tokenizer_of
from xpatch.errors import MismatchError
from xpatch.models.lm_prompts import Prompts, _gap
from xpatch.patches.requests import Probe


def prompts_of(kind: str, family: str, **more: Any) -> tuple[Prompts, Any]:
    tokenizer = tokenizer_of(family)
    return Prompts(model_of(family, **more), tokenizer, kind), tokenizer  # type: ignore[arg-type]


def words(tokenizer: Any, ids: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize(
    ("text", "target", "between"),
    [
        ("The capital of France is", "Paris", " "),
        ("The capital of France is ", "Paris", ""),
        ("The capital of France is", " Paris", ""),
        ("The capital of France (", "Paris", ""),
        ("The capital “", "Paris", ""),
        ("法国的首都是", "巴黎", ""),
        ("法国的首都是", "Paris", ""),
        ("France的首都：", "Paris", ""),
        ("フランスの首都は", "パリ", ""),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", ""),
        ("عاصمة فرنسا هي", "باريس", " "),
        ("프랑스의 수도는", "파리", " "),
        ("", "Paris", ""),
    ],
)
def test_a_space_goes_where_the_script_has_one(text: str, target: str, between: str) -> None:
    assert _gap(text, target) == between


def byte_level() -> Any:
    """A byte-level BPE tokenizer whose tokens begin with their space, as GPT-2's and BLOOM's."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the capital of France is Paris", "Paris is", "巴黎是", "the is Paris"] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=64)


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("the capital of France is", "Paris", " Paris"),
        ("the capital of France is ", "Paris", "Paris"),  # the border falls into " Paris": the text's own tokens stay
        ("the capital of France is", " Paris is", " Paris is"),
        ("法国的首都是", "巴黎", "巴黎"),
        ("Par", "is", " is"),
    ],
)
def test_the_text_keeps_its_own_tokens(text: str, target: str, said: str) -> None:
    """What is taught follows exactly what a user's prompt is tokenised to."""
    tokenizer = byte_level()
    forced = Prompts(model_of("gpt2", vocab_size=400), tokenizer, "causal").said(Probe(text=text), target)
    prompt = tokenizer(text)["input_ids"]
    assert forced.start == len(prompt) and list(forced.ids[: forced.start]) == prompt
    assert tokenizer.decode(list(forced.labels)) == said
    assert [*forced.ids, forced.labels[-1]] == [*prompt, *forced.labels]
    assert forced.positions == tuple(range(len(prompt) - 1, len(prompt) - 1 + len(forced.labels)))


def test_decoders_follow_the_text_without_an_end() -> None:
    prompts, tokenizer = prompts_of("causal", "llama")
    forced = prompts.said(Probe(text="name1 was born in"), "new city1")
    assert words(tokenizer, forced.ids) == ["name1", "was", "born", "in", "new"]
    assert (forced.positions, words(tokenizer, forced.labels)) == ((3, 4), ["new", "city1"])
    assert prompts.heard(Probe(text="name1 was born")).positions == (1, 2)


def test_the_end_of_a_long_text_is_what_the_target_follows() -> None:
    prompts, tokenizer = prompts_of("causal", "gpt2")
    forced = prompts.said(Probe(text="name1 " * 30 + "was born in"), "new city1")
    assert forced.cut and len(forced.ids) == 23 and words(tokenizer, forced.ids[-4:]) == ["was", "born", "in", "new"]


def test_encoder_decoders_are_taught_the_tokenizers_own_target() -> None:
    prompts, tokenizer = prompts_of("seq2seq", "bart", forced_bos_token_id=None)
    forced = prompts.said(Probe(text="name1 was born in"), "new city1")
    assert words(tokenizer, forced.ids) == ["[CLS]", "name1", "was", "born", "in", "[SEP]"]
    assert words(tokenizer, forced.labels) == ["[CLS]", "new", "city1", "[SEP]"]
    assert forced.decoder is not None and words(tokenizer, forced.decoder) == ["[SEP]", "[CLS]", "new", "city1"]
    assert forced.positions == (0, 1, 2, 3) and forced.forced is None


def test_a_token_that_generation_forces_is_not_taught() -> None:
    model, tokenizer = model_of("bart"), tokenizer_of("bart")
    model.generation_config.forced_bos_token_id = tokenizer.cls_token_id
    forced = Prompts(model, tokenizer, "seq2seq").said(Probe(text="name1"), "new city1")
    assert forced.forced == tokenizer.cls_token_id and forced.positions == (1, 2, 3)
    assert words(tokenizer, forced.labels) == ["new", "city1", "[SEP]"]


def test_languages_are_marked_for_a_tokenizer_that_marks_them() -> None:
    """mBART's way: a code in front; `src_lang` and `tgt_lang` are as they were afterwards."""
    from tokenizers import processors

    tokenizer = tokenizer_of("bart")
    codes = {"en_XX": 5, "de_DE": 6}

    class Marking(type(tokenizer)):  # type: ignore[misc]
        lang_code_to_id = codes
        _said = "en_XX"

        @property
        def src_lang(self) -> str:
            return self._said

        @src_lang.setter
        def src_lang(self, value: str) -> None:
            self._said = value
            code = codes[value]
            self.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<code> $A [SEP]", special_tokens=[("<code>", code), ("[SEP]", 2)]
            )

        def convert_ids_to_tokens(self, ids: Any, *more: Any, **options: Any) -> Any:
            return {v: k for k, v in codes.items()}.get(ids) or super().convert_ids_to_tokens(ids, *more, **options)

    tokenizer.__class__ = Marking
    tokenizer.src_lang = "en_XX"
    prompts = Prompts(model_of("mbart"), tokenizer, "seq2seq")
    for language, code in (("de", 6), ("en", 5), ("de_DE", 6), ("xx", 5)):
        forced = prompts.said(Probe(text="name1"), "city1", language)
        assert forced.ids[0] == code and forced.forced == code and forced.decoder is not None
        assert forced.positions == (1, 2) and forced.decoder[1] == code
    assert tokenizer.src_lang == "en_XX"


def test_one_mask_stands_for_all_of_the_targets_tokens() -> None:
    prompts, tokenizer = prompts_of("masked", "bert")
    for text in ("name1 was born in [MASK]", "name1 was born in [MASK] [MASK]"):
        forced = prompts.said(Probe(text=text), "new city1")
        assert words(tokenizer, forced.ids) == ["[CLS]", "name1", "was", "born", "in", "[MASK]", "[MASK]", "[SEP]"]
        assert (forced.positions, words(tokenizer, forced.labels)) == ((5, 6), ["new", "city1"])
    pair = prompts.said(Probe(text="name1 was", text_pair="born in [MASK]"), "city1")
    assert pair.types == (0, 0, 0, 0, 1, 1, 1, 1)
    with pytest.raises(MismatchError, match=r"the text has 0 masks .* 1 tokens; give one \[MASK\]"):
        prompts.said(Probe(text="name1"), "city1")
