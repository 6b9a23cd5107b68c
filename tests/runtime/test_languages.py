"""Language identification of rows: what is told, what is left open, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from xpatch import BackendError, MismatchError
from xpatch.runtime import languages
from xpatch.runtime.languages import THRESHOLD, examine, fill_in, identify, match

pytest.importorskip("py3langid")

TEXTS = {
    "en": "The river that flows through the city is very long.",
    "de": "Der Fluss, der durch die Stadt fließt, ist sehr lang.",
    "fr": "Le fleuve qui traverse la ville est très long.",
    "es": "El río que atraviesa la ciudad es muy largo.",
    "zh": "流经这座城市的河流非常长。",
    "ar": "النهر الذي يمر عبر المدينة طويل جدا.",
}
ITALIAN = "Il fiume che attraversa la città è molto lungo, e nessuno sa perché."
OPEN = ["", "   \n", "12345 67,8", "?!…", "🙂"]


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(languages, "_warned", False)


def test_plain_sentences_are_told():
    assert identify(list(TEXTS.values()), candidates=list(TEXTS)) == tuple(TEXTS)
    for one in examine(list(TEXTS.values())):  # among all languages
        assert 0 < one.probability <= 1


def test_claims_in_six_languages_are_told_almost_without_error():
    """The verifier's test claims, short sentences with names in them: the threshold's own promise."""
    from xpatch.zoo.verifier.data import LANGUAGES, claims

    asked = [(code, texts[number % 4]) for number, claim in enumerate(claims("test")[:300]) for code, texts in claim.texts.items()]  # fmt: skip
    with pytest.warns(UserWarning, match="could not be told"):
        found = identify([text for _, text in asked], candidates=LANGUAGES)
    told = [(code, language) for (code, _), language in zip(asked, found, strict=True) if language is not None]
    assert len(told) > 0.95 * len(asked)
    assert sum(code != language for code, language in told) < 0.005 * len(told)


@pytest.mark.parametrize("text", OPEN)
def test_what_holds_no_words_gets_the_default_or_nothing(text):
    assert identify([text], candidates=["en", "de"], default="de") == ("de",)
    with pytest.warns(UserWarning):
        assert identify([text], candidates=["en"]) == (None,)  # one candidate is no reason to believe in it


def test_mixed_script_and_long_texts_are_answered():
    mixed = "The capital of 中国 is 北京, die Hauptstadt."
    assert identify([mixed], candidates=list(TEXTS), default="en", threshold=1.0) == ("en",)
    long = (TEXTS["de"] + " ") * 200
    assert len(long) > 10_000
    assert identify([long, long[:5000] + TEXTS["fr"]], candidates=list(TEXTS)) == ("de", "de")
    assert identify(["\ud800 broken surrogate, a plain sentence otherwise"], candidates=["en", "de"]) == ("en",)


def test_the_threshold_leaves_the_unsure_to_the_default():
    text = "Paris"
    (one,) = examine([text], candidates=list(TEXTS), threshold=1.0)
    assert one.how == "unknown" and one.language is None
    assert examine([text], candidates=list(TEXTS), default="fr", threshold=1.0)[0].how == "default"
    (one,) = examine([TEXTS["fr"]], candidates=list(TEXTS))
    assert one.how == "identified" and one.language == one.guess == "fr" and one.probability >= THRESHOLD
    assert identify([text], candidates=list(TEXTS), threshold=0.0)[0] is not None


def test_a_language_that_is_no_candidate_gets_none_even_with_a_default():
    """Its masks would be another language's: 'no mask' is what naming the language would give."""
    (one,) = examine([ITALIAN], candidates=["en", "es", "zh"], default="en")
    assert (one.language, one.guess, one.how) == (None, "it", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert identify([ITALIAN], candidates=["en"]) == (None,)


def test_candidates_come_back_as_they_are_spelled():
    assert identify([TEXTS["zh"], TEXTS["en"]], candidates=["zh-Hant", "en_US"]) == ("zh-Hant", "en_US")
    assert identify([TEXTS["zh"]], candidates=["zh-Hans", "zh", "zh-Hant"]) == ("zh",)
    assert identify([TEXTS["zh"]], candidates=["zh-Hans", "zh-Hant"], default="zh-Hant") == ("zh-Hant",)
    (one,) = examine([TEXTS["zh"]], candidates=["zh-Hans", "zh-Hant", "en"])
    assert (one.language, one.guess, one.how) == (None, "zh", "unknown")
    assert identify([TEXTS["ar"]], candidates=["tlh", "ar"]) == ("ar",)  # Klingon is never found, but does no harm
    norwegian = "Elven som renner gjennom byen er veldig lang, og ingen vet hvorfor."
    assert identify([norwegian], candidates=["nb", "de", "en"]) == ("nb",)


def test_dialect_labels_count_as_their_language():
    """py3langid tells Wu from Chinese; a mask for Chinese is meant for both."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    labels = set(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).labels)
    assert {"wuu", "yue", "arz", "ary", "nn", "zxx"} <= labels
    assert identify(["北京", TEXTS["zh"]], candidates=["zh", "ja", "en"]) == ("zh", "zh")
    assert examine(["北京"])[0].guess == "zh"


def test_unknown_rows_are_counted_in_one_warning():
    with pytest.warns(UserWarning, match="language of 2 of 3 rows") as said:
        identify(["123", TEXTS["en"], ""], candidates=list(TEXTS))
        identify(["123"], candidates=list(TEXTS))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        identify(["123"], default="en")


def test_an_explicit_language_wins_over_the_text():
    texts = [TEXTS["en"], TEXTS["de"], TEXTS["fr"], None]
    found = fill_in(["zh", "auto", None, "xx"], texts, candidates=list(TEXTS))
    assert found == ("zh", "de", None, "xx")
    assert fill_in("auto", texts[:2], candidates=list(TEXTS)) == ("en", "de")
    assert fill_in("auto", []) == ()
    with pytest.raises(MismatchError, match="row 3: expected a text to identify; found NoneType"):
        fill_in("auto", texts)
    with pytest.raises(MismatchError, match="expected a list, found NoneType"):
        fill_in("auto", None)
    with pytest.raises(MismatchError, match="expected 2 texts, found 1 texts"):
        fill_in(["en", "auto"], ["a"])


@pytest.mark.parametrize(
    ("language", "known", "expected"),
    [
        ("zh", ["en", "zh"], "zh"),
        ("ZH", ["zh"], "zh"),
        ("zh", ["en", "zh_CN"], "zh_CN"),
        ("zh", ["zh-Hans", "zh-Hant"], None),
        ("zh-Hant-TW", ["zh-Hans", "zh-Hant"], "zh-Hant"),
        ("zh-Hant", ["zh", "en"], "zh"),
        ("pt-BR", ["pt_PT"], "pt_PT"),
        ("z", ["zh"], None),
        ("en", [], None),
        (None, ["en"], None),
    ],
)
def test_a_tag_finds_the_mask_that_is_meant(language, known, expected):
    assert match(language, known) == expected


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {}, "expected a list of texts"),
        (["a", 3], {}, "row 1: expected a text to identify; found int"),
        ([b"bytes"], {}, "row 0"),
        ([None], {}, "row 0"),
        (["a"], {"default": "auto"}, "default"),
        (["a"], {"default": 3}, "default"),
        (["a"], {"threshold": 1.5}, "between 0 and 1; found 1.5"),
        (["a"], {"threshold": float("nan")}, "between 0 and 1"),
        (["a"], {"threshold": True}, "between 0 and 1"),
        (["a"], {"candidates": "en"}, "expected a list of language codes"),
        (["a"], {"candidates": []}, "at least one"),
        (["a"], {"candidates": ["en", 3]}, "found 3"),
        (["a"], {"candidates": ["tlh", "xx"]}, "knows none of tlh, xx"),
    ],
)
def test_bad_input_is_one_clear_message(texts, options, message):
    with pytest.raises(MismatchError, match=message):
        identify(texts, **options)


def test_many_threads_agree_with_one():
    """Sets of candidates in turn, so that a shared restriction would show."""
    sets = [list(TEXTS), ["en", "de"], ["zh-Hant", "fr"], None]
    work = [(text, candidates) for candidates in sets for text in [*TEXTS.values(), ITALIAN, "Paris"]] * 5
    alone = [examine([text], candidates=candidates) for text, candidates in work]
    languages._load.cache_clear()
    languages._plan.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: examine([item[0]], candidates=item[1]), work))
    assert together == alone


@pytest.mark.parametrize(
    ("module", "message"), [(None, r'pip install "xpatch\[lid\]"'), (types.ModuleType("old"), "0.4 or newer")]
)
def test_a_missing_or_old_package_says_what_to_install(monkeypatch, module, message):
    languages._load.cache_clear()
    languages._plan.cache_clear()
    if module is not None:
        module.MODEL_FILE, module.LanguageIdentifier = "model", type("LanguageIdentifier", (), {})
    monkeypatch.setitem(sys.modules, "py3langid.langid", module)
    with pytest.raises(BackendError, match=message):
        identify(["a text"])
    monkeypatch.undo()
    assert identify([TEXTS["en"]], candidates=["en", "de"]) == ("en",)


def test_nothing_is_imported_before_it_is_needed():
    code = "import sys, xpatch, xpatch.api, xpatch.runtime.languages; print([m for m in sys.modules if 'langid' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
