"""What a step draws: languages, wordings, flips, texts to keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import LABELS
from tests.editors.hyper.conftest import facts
from xpatch.editors.hyper.config import TrainConfig
from xpatch.editors.hyper.objective import wanted_labels
from xpatch.editors.hyper.sampling import Sampler, as_examples
from xpatch.errors import FormatError, MismatchError
from xpatch.patches.requests import EditRequest, Probe


def sampler(seed: int = 0, count: int = 6, locality: Any = None, **settings: Any) -> Sampler:
    return Sampler(as_examples(facts(count), LABELS), locality or {}, TrainConfig(**settings), seed)


def languages(drawn: list[Any]) -> set[tuple[str, str]]:
    return {(draw.language, draw.outer_language) for draw in drawn}


def test_modes() -> None:
    def found(**settings: Any) -> set[tuple[str, str]]:
        return languages([sampler(**settings).draw(index) for index in range(200)])

    every = ("en", "de", "xx")
    assert found() == {("en", "en")}
    assert found(outer_languages="all") == {("en", language) for language in every}
    assert found(edit_languages="all", outer_languages="all") == {(a, b) for a in every for b in every}
    assert found(edit_languages="all") == {(a, a) for a in every}
    assert found(edit_languages=("de",), outer_languages=("en", "xx")) == {("de", "en"), ("de", "xx")}
    assert sampler(edit_languages="all").languages == ("de", "en", "xx")


def test_every_version_of_a_draw_is_of_one_fact() -> None:
    texts = {request.id: request.versions for request in facts(6)}
    drawn = [sampler(edit_languages="all", outer_languages="all", outer_texts="any").draw(i) for i in range(100)]
    for draw in drawn:
        versions = texts[draw.id]
        assert draw.inner.text == versions[draw.language].text
        outer = versions[draw.outer_language]
        assert draw.outer.text in (outer.text, outer.rephrases[0].text)
        own = {probe.text for version in versions.values() for probe in (version.probe, *version.rephrases)}
        assert not own & {probe.text for probe in draw.locality}


def test_wordings() -> None:
    for texts, rephrased in (("edit", {False}), ("rephrase", {True}), ("any", {False, True})):
        drawn = [sampler(outer_texts=texts).draw(index) for index in range(60)]
        assert {draw.outer.text != draw.inner.text for draw in drawn} == rephrased
    abroad = [sampler(outer_languages=("de",)).draw(index) for index in range(20)]
    assert {draw.outer.text.split()[1] for draw in abroad} == {"wurde"}  # the parallel text, not its rephrase


def test_each_pass_is_a_permutation_and_draws_depend_on_seed_and_step_alone() -> None:
    first, other = sampler(), sampler()
    assert {first.draw(index).id for index in range(6)} == {f"fact-{number}" for number in range(6)}
    order = [first.draw(index).id for index in range(6, 12)]
    assert sorted(order) == sorted(f"fact-{number}" for number in range(6))
    assert [other.draw(index) for index in (20, 3, 20)] == [first.draw(index) for index in (20, 3, 20)]
    assert [sampler(seed=1).draw(index) for index in range(12)] != [first.draw(index) for index in range(12)]


def test_half_of_the_edits_flip_to_another_label() -> None:
    drawn = [sampler(count=12).draw(index) for index in range(600)]
    logits = torch.zeros(600, 3)
    logits[:, 1] = 1
    labels = wanted_labels(logits, drawn)
    assert abs(float((labels == 1).float().mean()) - 0.5) < 0.07
    assert abs(float((labels == 0).float().mean()) - 0.25) < 0.06  # uniform over the other labels
    assert all((label == 1) == (draw.flip is None) for label, draw in zip(labels.tolist(), drawn, strict=True))
    given = Sampler(as_examples(facts(4, target="UNKNOWN"), LABELS), {}, TrainConfig(flips=None), 0)
    assert wanted_labels(logits[:4], [given.draw(index) for index in range(4)]).tolist() == [2] * 4


def test_locality_probes_and_texts() -> None:
    request = EditRequest.model_validate(
        {"id": "1", "versions": {"en": {"text": "name1", "locality": ["name2 stays"]}}}
    )
    examples = as_examples([request], LABELS)
    found = Sampler(examples, {"en": [Probe(text="name3 stays")]}, TrainConfig(locality_per_edit=3), 0).draw(0)
    assert [probe.text for probe in found.locality] == ["name2 stays", "name3 stays", "name3 stays"]
    with pytest.raises(FormatError, match="texts that must stay"):
        Sampler(examples, {}, TrainConfig(locality_per_edit=2), 0).draw(0)


def test_wrong_data() -> None:
    with pytest.raises(FormatError, match="edit languages"):
        sampler(edit_languages=("fr",))
    with pytest.raises(FormatError, match="flips=None"):
        sampler(flips=None)
    with pytest.raises(MismatchError, match="no label 'MAYBE'.*REFUTES"):
        as_examples(facts(1, target="MAYBE"), LABELS)
