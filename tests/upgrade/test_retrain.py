"""`xpatch.retrain` on the bundled verifier and an upgrade of it, made here by training it on a little more."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import xpatch
from xpatch import ConflictError, FormatError, LanguageMask, MismatchError, zoo
from xpatch.evaluation import predict
from xpatch.patches.types import EditRecord
from xpatch.upgrade import runner
from xpatch.upgrade.report import LanguageReport
from xpatch.zoo.verifier.data import requests

LANGUAGES = ("en", "de", "zh")
QUICK = {"steps": 100, "rounds": 1}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def verifier():
    return zoo.load("verifier")


@pytest.fixture(scope="module")
def asked(verifier):
    """Four claims the verifier gets wrong in English, in three languages; the first is true, the others are not."""
    model, tokenizer = verifier
    wanted = requests("edit")[:160]
    said = predict(model, tokenizer, [request.versions["en"].text for request in wanted])
    wrong = [request for request, answer in zip(wanted, said, strict=True) if answer != request.target]
    true, false = ([request for request in wrong if request.target == label] for label in ("SUPPORTS", "REFUTES"))
    wrong = [*true[:1], *false[:3]]
    assert len(wrong) == 4
    return [
        request.model_copy(update={"versions": {code: request.versions[code] for code in LANGUAGES}})
        for request in wrong
    ]


@pytest.fixture(scope="module")
def memory():
    from xpatch.zoo.verifier.data import memory_texts

    texts = memory_texts(8)
    return {code: texts[code] for code in LANGUAGES}


@pytest.fixture(scope="module")
def old_set(verifier, asked, memory):
    """Two edits by MPN and one by Transformer-Patcher."""
    first = xpatch.edit(*verifier, asked[:2], memory=memory, seed=4, **QUICK)
    return first + xpatch.edit(*verifier, asked[2:3], method="t-patcher", memory=memory, **QUICK)


@pytest.fixture(scope="module")
def upgraded(verifier, asked):
    """The verifier, trained on until it knows the first claim in every language."""
    model, tokenizer = copy.deepcopy(verifier[0]), verifier[1]
    texts = [version.text for version in asked[0].versions.values()]
    texts += [probe.text for version in asked[0].versions.values() for probe in version.rephrases]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    gold = torch.tensor([model.config.label2id[asked[0].target]] * len(texts))
    optimiser = torch.optim.SGD(model.bert.encoder.layer[-1].parameters(), lr=0.02)
    for _ in range(100):
        logits = model(**batch).logits
        if (logits.softmax(-1)[range(len(texts)), gold] > 0.8).all():
            break
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, gold).backward()
        optimiser.step()
    else:
        pytest.fail("the upgrade did not learn its claim")
    return model.eval(), tokenizer


def answers(base, patches, request):
    """Language -> the model's label for a request's own wordings."""
    model, tokenizer = base
    if patches is not None:
        xpatch.apply(model, patches, name="test", tokenizer=tokenizer)
    try:
        said = predict(model, tokenizer, [version.text for version in request.versions.values()])
    finally:
        if patches is not None:
            xpatch.remove(model, "test")
    return dict(zip(request.versions, said, strict=True))


@pytest.fixture(scope="module")
def heard():
    """What happened while `again` was made: how many sets were applied when an editor was called, what it got, and progress."""
    return {"applied": [], "asked": [], "progress": []}


@pytest.fixture(scope="module")
def again(old_set, upgraded, verifier, memory, heard):
    def spy(model, tokenizer, asked, **options):
        heard["applied"].append(len(xpatch.status(model).sets))
        heard["asked"].append(asked)
        return xpatch.edit(model, tokenizer, asked, **options)

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "edit", spy)
        return xpatch.retrain(
            old_set, *upgraded, memory=memory, old=verifier, progress=lambda *step: heard["progress"].append(step)
        )


def test_the_report_is_what_the_models_answer(again, old_set, upgraded, verifier, asked):
    report = again.report
    assert report.compared and [edit.id for edit in report.edits] == [request.id for request in asked[:3]]
    for request, edit in zip(asked, report.edits, strict=False):
        seen = {
            "before": answers(upgraded, None, request),
            "after": answers(upgraded, again.patches, request),
            "old": answers(verifier, old_set, request),
        }
        for code, found in edit.languages.items():
            for name, said in seen.items():
                assert getattr(found, name) == (said[code] == request.target), (edit.id, code, name)
        assert edit.status in ("lost", "failed") or all(
            found.after == found.texts for code, found in edit.languages.items() if edit.method == "mpn" or code == "en"
        )


def test_what_the_upgrade_learned_needs_no_patch_any_more(again, asked):
    first, second, third = again.report.edits
    assert first.status == "already-right", again.report
    assert again.patches.edit(first.id).rows == {}
    assert all(found.before == found.texts for found in first.languages.values())
    assert again.patches.edit(second.id).status == "edited" and again.patches.edit(third.id).status == "edited"


def test_edits_are_trained_as_they_were_recorded(again, old_set):
    for record in old_set.edits:
        now = again.patches.edit(record.id)
        assert (now.method, now.seed, now.hyperparameters) == (record.method, record.seed, record.hyperparameters)
        assert now.request == record.request


def test_the_models_are_left_as_they_were(again, upgraded, verifier):
    for model in (upgraded[0], verifier[0]):
        assert not xpatch.status(model).sets
    assert again.patches.base is not None
    xpatch.patches.identity.check_fit(again.patches, *upgraded)


def test_methods_meet_and_spare_each_other(again, heard, asked):
    """The second trains on a model that carries the patches of the first, as it will be served beside them; each spares the
    other's texts; and the ledger has the requests as they were asked."""
    assert heard["applied"] == [0, 1]
    for mine, others in ((heard["asked"][0], asked[2:3]), (heard["asked"][1], asked[:2])):
        spared = {probe.text for request in mine for probe in request.versions["en"].locality}
        assert spared == {
            probe.text
            for request in others
            for version in request.versions.values()
            for probe in (version.probe, *version.rephrases)
        }
    assert [record.request for record in again.patches.edits] == asked[:3]


def test_the_same_base_gives_the_same_set(asked, verifier, memory):
    first = xpatch.edit(*verifier, asked[1:2], memory=memory, seed=4, steps=30)
    again = xpatch.retrain(first, *verifier, memory=memory)
    assert again.patches.fingerprint == first.fingerprint == again.report.patches == again.report.retrained


def test_progress_counts_the_edits_of_all_methods(again, heard):
    training = [(done, of) for stage, done, of in heard["progress"] if stage == "training"]
    assert training[-1] == (3, 3) and all(of == 3 for _, of in training) and training == sorted(training)
    assert heard["progress"][-1] == ("measuring", 2, 2)


def test_one_method_and_seed_for_all(old_set, upgraded, memory):
    made = xpatch.retrain(old_set, *upgraded, method="ft", preset="paper", seed=6, memory=memory, steps=3).patches
    assert {(record.method, record.seed) for record in made.edits} == {("ft", 6)}
    assert {record.hyperparameters["preset"] for record in made.edits} == {"paper"}


def test_what_fails_and_what_is_left_out_is_reported(asked, old_set, upgraded, memory, tmp_path):
    late = asked[3].model_copy(update={"expires": "2001-01-01"})
    records = list(old_set.edits)
    records[0] = dataclasses.replace(records[0], request=None)
    records.append(dataclasses.replace(records[1], id=late.id, request=late, rows={}))
    bad = late.model_copy(update={"id": "bad", "target": "MAYBE", "expires": None})
    records.append(
        dataclasses.replace(records[-1], id="bad", request=bad, status="rejected", group=None, message="no label")
    )
    patches = dataclasses.replace(old_set, edits=tuple(records))
    xpatch.save(patches, tmp_path / "old")
    again = xpatch.retrain(tmp_path / "old", *upgraded, memory=memory, steps=1, rounds=0, rescue=False)
    assert [edit.status for edit in again.report.edits] == ["redacted", "failed", "failed", "expired", "rejected"]
    assert not again.report.holds and not again.report.compared
    assert [record.id for record in again.patches.edits] == [asked[1].id, asked[2].id]
    assert again.report.edits[0].languages == {} and "2001" in again.report.edits[3].message
    assert again.report.edits[4].message == "no label"


def test_what_is_rejected_now_holds_only_where_it_is_right(asked):
    """Sets that were added up may repeat or contradict each other."""
    record = EditRecord(id=asked[0].id, method="mpn", status="rejected", request=asked[0], message="duplicate of 'x'")
    for after, status in ((1, "holds"), (0, "failed")):
        found = {"en": LanguageReport(texts=1, after=after)}
        assert runner._verdict(record, found) == (status, "rejected: duplicate of 'x'")


def test_groups_that_cannot_be_one_set_say_so(old_set, upgraded, memory, monkeypatch):
    count = iter(range(9))

    def masked(*arguments, **options):
        made = xpatch.edit(*arguments, **options)
        mask = LanguageMask(languages=("en",), inner=torch.full((1, 256), float(next(count))), outer=torch.ones(1, 256))
        return dataclasses.replace(made, masks={"m": mask})

    monkeypatch.setattr(runner, "edit", masked)
    with pytest.raises(
        ConflictError, match="trained with t-patcher cannot be one set with those trained with mpn.*mask"
    ):
        xpatch.retrain(old_set, *upgraded, memory=memory, steps=1, rounds=0)
    assert not xpatch.status(upgraded[0]).sets


def test_bad_input_is_refused_before_training(old_set, upgraded, verifier, memory, tmp_path):
    model, tokenizer = upgraded
    with pytest.raises(FormatError, match="nothing"):
        xpatch.retrain(tmp_path / "nothing", model, tokenizer)
    with pytest.raises(MismatchError, match="expected a PatchSet or its folder; found int"):
        xpatch.retrain(3, model, tokenizer)
    with pytest.raises(MismatchError, match="old base is not the one this set was made for"):
        xpatch.retrain(old_set, *verifier, old=upgraded)
    with pytest.raises(MismatchError, match=r"expected \(model, tokenizer\)"):
        xpatch.retrain(old_set, model, tokenizer, old=verifier[0])
    with pytest.raises(MismatchError, match="language 'xx' occurs in no request; languages there are: de, en, zh"):
        xpatch.retrain(old_set, model, tokenizer, languages=["xx"])
    with pytest.raises(FormatError, match="found the string 'en'"):
        xpatch.retrain(old_set, model, tokenizer, languages="en")
    with pytest.raises(FormatError, match="no setting 'stepz'"):
        xpatch.retrain(old_set, model, tokenizer, memory=memory, stepz=3)
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.id2label, other.config.label2id = {0: "false", 1: "true"}, {"false": 0, "true": 1}
    with pytest.raises(MismatchError, match="no label '(REFUTES|SUPPORTS)'.*its labels are false, true"):
        xpatch.retrain(old_set, other, tokenizer)


def test_a_retraining_goes_on_where_it_was_interrupted(again, old_set, upgraded, memory, tmp_path):
    heard = []

    def report(stage, done, total):
        heard.append((stage, done, total))
        if stage == "training" and done == 3:  # the second group's edit
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        xpatch.retrain(old_set, *upgraded, memory=memory, checkpoint=tmp_path, progress=report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["group-1", "group-2"]
    assert not xpatch.status(upgraded[0]).sets
    heard.clear()
    found = xpatch.retrain(
        old_set, *upgraded, memory=memory, checkpoint=tmp_path, progress=lambda *step: heard.append(step)
    )
    assert found.patches.fingerprint == again.patches.fingerprint
    assert ("resuming", 2, 3) in heard
