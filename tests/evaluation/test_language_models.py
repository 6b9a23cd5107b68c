"""`xpatch.evaluate` and `xpatch.retrain` on language models: what greedy decoding says, before and with patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from tests.editors.lm import CITIES, MASKED, NAMES, QUICK, TEXTS, make_requests, memory, model_of, says, tokenizer_of
from xpatch.errors import MismatchError
from xpatch.evaluation import Readings, predict
from xpatch.patches.types import PatchSet

KINDS = ("gpt2", "llama", "bart", "t5", "bert")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def edited(request: pytest.FixtureRequest) -> tuple[str, Any, Any, PatchSet]:
    kind = request.param
    torch.set_num_threads(1)
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    return kind, model, tokenizer, xpatch.edit(model, tokenizer, make_requests(kind), memory=memory(), **QUICK)


def others(kind: str) -> dict[str, list[Any]]:
    mask = " [MASK]" if kind in MASKED else ""
    return {code: [text.format(name) + mask for name in NAMES[20:24]] for code, text in TEXTS.items()}


def test_the_report_is_what_generate_says(edited: Any) -> None:
    kind, model, tokenizer, patches = edited
    requests, locality = make_requests(kind), others(kind)
    report = xpatch.evaluate(model, tokenizer, requests, patches, locality_test=locality)
    assert {record.status for record in patches} == {"edited"} and len(report.needed) == 3
    found = report.metrics
    assert found.reliability is not None and found.reliability.value == 1 and found.clg_avg is not None
    assert found.clg_avg.value == 1 and all(one.value == 0 for one in found.before.values())
    xpatch.apply(model, patches)
    try:
        for code in TEXTS:
            answers = report.predictions["edit"][code]
            for request, gold, after in zip(requests, answers.gold, answers.after, strict=True):
                target = request.target_of(code) or ""
                text = request.versions[code].text
                text = text.replace("[MASK]", "[MASK] [MASK]")
                assert report.labels[gold] == target and after == gold
                assert says(model, tokenizer, text).startswith(target)
            now = [says(model, tokenizer, text, 16) for text in locality[code]]
            said = [report.labels[answer] for answer in report.predictions["locality_test"][code].after]
            assert said == [text.strip() for text in now]
    finally:
        xpatch.remove(model)
    for code in TEXTS:
        answers = report.predictions["locality_test"][code]
        assert [report.labels[answer] for answer in answers.before] == [
            says(model, tokenizer, text, 16).strip() for text in locality[code]
        ]
        assert found.unchanged_test[code].value == pytest.approx(
            sum(a == b for a, b in zip(answers.before, answers.after, strict=True)) / len(answers.before)
        )


def test_without_patches_and_with_a_baseline(edited: Any) -> None:
    kind, model, tokenizer, patches = edited
    requests, locality = make_requests(kind), others(kind)
    plain = xpatch.evaluate(model, tokenizer, requests, locality_test=locality)
    assert plain.metrics.reliability is not None and plain.metrics.reliability.value == 0
    assert plain.metrics.unchanged_avg is not None and plain.metrics.unchanged_avg.value == 1
    whole = xpatch.evaluate(model, tokenizer, requests, patches, locality_test=locality)
    spared = xpatch.evaluate(model, tokenizer, requests, patches, locality_test=locality, baseline=plain)
    assert spared.metrics == whole.metrics
    for report in (whole, spared):
        for by_language in report.predictions.values():
            for code, answers in by_language.items():
                assert len(answers.id) == len(answers.before), code
    names = [
        {
            (kind_, code): [r.labels[i] for i in a.before]
            for kind_, by in r.predictions.items()
            for code, a in by.items()
        }
        for r in (whole, spared)
    ]
    assert names[0] == names[1]


def test_what_cannot_be_said_names_the_case() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    for target, said in (("Paris", "no tokens for the target 'Paris'"), (" ".join(CITIES * 3), "36 tokens")):
        with pytest.raises(MismatchError, match=f"case 'a', version 'en': .*{said}"):
            xpatch.evaluate(model, tokenizer, [{"id": "a", "text": "name1 was born in", "target": target}])


def test_what_is_for_classifiers_alone_says_so() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    with pytest.raises(MismatchError, match="GPT2LMHeadModel is a language model .* xpatch.evaluate"):
        predict(model, tokenizer, ["name1"])
    with pytest.raises(MismatchError, match="GPT2LMHeadModel is not a sequence classifier"):
        Readings(model, tokenizer)


def test_the_model_is_left_as_it_was() -> None:
    model, tokenizer = model_of("gpt2"), tokenizer_of("gpt2")
    model.train()
    settings, state = model.generation_config.to_dict(), torch.random.get_rng_state()
    xpatch.evaluate(model, tokenizer, make_requests("gpt2"), locality_train=others("gpt2"))
    assert model.training and model.generation_config.to_dict() == settings
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_set_is_trained_again_on_another_base(kind: str) -> None:
    model, tokenizer = model_of(kind), tokenizer_of(kind)
    requests = make_requests(kind)
    old = xpatch.edit(model, tokenizer, requests[:2], memory=memory(), **QUICK)
    old = old + xpatch.edit(model, tokenizer, requests[2:], "t-patcher", memory=memory(), **QUICK)
    new = model_of(kind)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    again = xpatch.retrain(old, new, tokenizer, memory=memory(), old=(model, tokenizer), progress=False)
    assert [edit.id for edit in again.report.edits] == [request.id for request in requests] and again.report.compared
    for edit in again.report.edits:
        own = edit.languages["en"]
        assert edit.status in ("holds", "lost") and own.before < own.texts, again.report
    xpatch.apply(new, again.patches, tokenizer=tokenizer)
    for request, edit in zip(requests, again.report.edits, strict=True):
        for code, found in edit.languages.items():
            text = request.versions[code].text
            right = says(new, tokenizer, text).startswith(request.target_of(code) or "")
            assert right or found.after < found.texts
