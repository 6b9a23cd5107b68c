"""One sampler for every method: what each choice trains on and needs, and the setting that picks it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.editors.conftest import FRAMES, QUICK, ask, make_requests, memory, model_of, task_of, tokenizer_of
from xpatch.editors import edit, methods
from xpatch.editors.rows import EditRows, SampledConfig
from xpatch.editors.samplers import SAMPLERS
from xpatch.errors import FormatError
from xpatch.patches.requests import EditRequest

FAMILY = ("ft", "ft-l", "calinet", "grace")


def test_choices_are_nested_and_begin_with_the_edits_own_language() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    for found in task_of(model, tokenizer, make_requests(model, tokenizer, 3)).edits:
        own, one, all_ = (SAMPLERS[name](found, random.Random(0)) for name in ("own", "one", "all"))
        assert [len(own), len(one), len(all_)] == [1, 2, len(FRAMES)]
        assert own[0] == one[0] == all_[0] == found.versions[0] and one[1] in all_[1:]


def test_one_draws_every_other_language_about_as_often() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    found = task_of(model, tokenizer, make_requests(model, tokenizer, 1)).edits[0]
    drawn = [SAMPLERS["one"](found, random.Random(seed))[1].language for seed in range(200)]
    assert set(drawn) == {"de", "xx"} and 70 < drawn.count("de") < 130


def test_an_edit_in_one_language_is_the_same_for_all_choices() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    found = task_of(model, tokenizer, [EditRequest.model_validate({"id": "1", "text": "name1", "target": "0"})]).edits[
        0
    ]
    assert {SAMPLERS[name](found, random.Random(0)) for name in SAMPLERS} == {found.versions}


@pytest.mark.parametrize(("choice", "texts"), [("own", 1), ("one", 2), ("all", 3)])
def test_rows_follow_the_choice(choice: Any, texts: int) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 4)
    for rephrases in (False, True):
        config = SampledConfig(train_languages=choice, rephrases=rephrases)
        rows = EditRows(task_of(model, tokenizer, requests), "ft", config, memory=True)
        assert all(plan.required == len(plan.chosen) == texts for plan in rows.plans)
        assert all(len(plan.rows) == texts * (1 + rephrases) for plan in rows.plans)
        languages = {"own": 1, "one": 3, "all": 3}[choice]  # four requests draw both other languages
        assert len(rows.memory) == 4 * languages
        trained = {row for plan in rows.plans for row in plan.rows}
        assert trained.isdisjoint(rows.memory.tolist())


@pytest.mark.parametrize("method", FAMILY)
def test_training_on_all_languages_edits_all_of_them(method: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 1)
    patches = edit(
        model, tokenizer, requests, method, memory=memory(), progress=False, train_languages="all", **QUICK[method]
    )
    (record,) = patches.edits
    assert record.status == "edited" and record.message and record.message.startswith("right in en, de, xx")
    from xpatch import apply

    apply(model, patches)
    target = model.config.label2id[requests[0].target]
    assert ask(model, tokenizer, [version.text for version in requests[0].versions.values()]) == [target] * 3


def test_presets_name_the_papers_choices() -> None:
    found = methods()
    for method in FAMILY:
        assert {"default", "paper", "one", "all"} <= set(found[method].presets)


def test_only_the_fine_tuning_family_has_the_setting() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    request = [{"id": "1", "text": "name1", "target": "0"}]
    with pytest.raises(FormatError, match="no setting 'train_languages'"):
        edit(model, tokenizer, request, "mpn", progress=False, train_languages="own")
    for method in FAMILY:
        with pytest.raises(FormatError, match="train_languages.*'own', 'one' or 'all'"):
            edit(model, tokenizer, request, method, progress=False, train_languages="both")
