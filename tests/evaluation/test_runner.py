"""`xpatch.evaluate` end to end on a tiny classifier: what it asks, what it leaves, what it refuses."""

from __future__ import annotations

import io
import json
import random

import pytest
import torch

import xpatch
from xpatch.errors import FormatError, MismatchError
from xpatch.evaluation import Report, evaluate, pool, predict
from xpatch.models.anatomy import final_ffn
from xpatch.patches.requests import Probe
from xpatch.patches.types import EditRecord, PatchNeurons, PatchSet

LABELS = ("REFUTES", "SUPPORTS")


def sentence(seed):
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(60)}" for _ in range(8))


@pytest.fixture
def cases():
    return [
        {
            "id": f"c{i}",
            "target": LABELS[i % 2],
            "versions": {
                language: {
                    "text": sentence(f"{i}{language}"),
                    "subject": f"s{i // 2}",
                    "rephrases": [sentence(f"{i}{language}r")],
                    "locality": [sentence(f"{i}{language}l")],
                }
                for language in ("en", "zh")
            },
        }
        for i in range(12)
    ]


@pytest.fixture
def locality():
    return {
        language: [Probe(text=sentence(f"{language}{i}"), target=LABELS[i % 2]) for i in range(20)]
        for language in ("en", "zh")
    }


@pytest.fixture
def patches(model):
    """A neuron that fires everywhere and is strong enough to change predictions."""
    torch.manual_seed(1)
    part = PatchNeurons(final_ffn(model).name, torch.zeros(1, 32), torch.ones(1), 30 * torch.randn(1, 32), "relu")
    edits = tuple(EditRecord(f"c{i}", "mpn", "edited" if i < 3 else "already-right") for i in range(12))
    return PatchSet(parts={"ffn": part}, edits=edits)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_patched_and_unpatched_predictions_are_the_models_own(model, tokenizer, cases, locality, patches):
    kept = state(model)
    report = evaluate(model, tokenizer, cases, patches, locality_train=locality, locality_test=locality)
    texts = [case["versions"]["zh"]["text"] for case in cases]
    names = report.labels
    recorded = report.predictions["edit"]["zh"]
    assert [names[i] for i in recorded.before] == predict(model, tokenizer, texts)
    xpatch.apply(model, patches, name="p")
    assert [names[i] for i in recorded.after] == predict(model, tokenizer, texts)
    standing = evaluate(model, tokenizer, cases, locality_train=locality, locality_test=locality, needed=report.needed)
    xpatch.remove(model, "p")
    assert standing.predictions == report.predictions and standing.metrics == report.metrics
    assert recorded.before != recorded.after
    assert same_state(model, kept) and not any(module._forward_hooks for module in model.modules())
    assert report.needed == ("c0", "c1", "c2") and report.edits == 12
    assert report.metrics.reliability.clusters == 6  # two cases share a subject


def test_an_unpatched_model_changes_nothing(model, tokenizer, cases, locality):
    report = evaluate(model, tokenizer, cases, locality_test=locality)
    assert report.metrics.unchanged_avg.value == 1 and report.metrics.near_unchanged["zh"].value == 1
    assert report.metrics.locality_test == report.metrics.locality_test_before
    assert report.metrics.reliability == report.metrics.before["en"]
    wrong = {
        case
        for answers in report.predictions["edit"].values()
        for case, gold, before in zip(answers.id, answers.gold, answers.before, strict=True)
        if gold != before
    }
    assert set(report.needed) == wrong


def test_a_set_without_parts_changes_nothing(model, tokenizer, cases):
    empty = PatchSet(parts={}, edits=(EditRecord("c0", "mpn", "failed"),))
    report = evaluate(model, tokenizer, cases, empty)
    assert report.predictions == evaluate(model, tokenizer, cases).predictions and report.needed == ("c0",)


def test_baseline_predictions_are_reused(model, tokenizer, cases, locality, patches, monkeypatch):
    first = evaluate(model, tokenizer, cases, locality_test=locality)
    whole = evaluate(model, tokenizer, cases, patches, locality_test=locality)
    import xpatch.api

    monkeypatch.setattr(xpatch.api, "disabled", None)
    assert evaluate(model, tokenizer, cases, patches, locality_test=locality, baseline=first) == whole
    with pytest.raises(MismatchError, match="baseline"):
        evaluate(model, tokenizer, cases, patches, baseline=first)


def test_patches_come_off_on_an_error(model, tokenizer, cases, patches, monkeypatch):
    kept = state(model)
    before = predict(model, tokenizer, [case["versions"]["en"]["text"] for case in cases])

    def broken(*_, **__):
        raise RuntimeError("mid-way")

    monkeypatch.setattr("xpatch.evaluation.subject.predict_indices", broken)
    with pytest.raises(RuntimeError, match="mid-way"):
        evaluate(model, tokenizer, cases, patches)
    monkeypatch.undo()
    assert same_state(model, kept)
    assert predict(model, tokenizer, [case["versions"]["en"]["text"] for case in cases]) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_public_name_folder_and_files(model, tokenizer, cases, locality, patches, tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(case) for case in cases))
    rows = [{"language": k, **p.model_dump(exclude_none=True)} for k, probes in locality.items() for p in probes]
    other = tmp_path / "locality.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert xpatch.evaluate is evaluate
    from_files = xpatch.evaluate(model, tokenizer, path, patches, locality_test=other)
    assert from_files == evaluate(model, tokenizer, cases, patches, locality_test=locality)
    again = Report.from_json(_written(from_files, tmp_path / "report.json"))
    assert again == from_files
    assert "predictions" not in json.loads(from_files.to_json(predictions=False))


def _written(report, path):
    report.to_json(path)
    assert not path.with_name(path.name + ".tmp").exists()
    return path


def test_groups_are_resampled_together(model, tokenizer, cases, locality, patches):
    groups = {"test": [str(i // 5) for i in range(20)]}
    report = evaluate(model, tokenizer, cases, patches, locality_test=locality, locality_groups=groups)
    assert report.metrics.unchanged["en"].clusters == 4 and report.metrics.unchanged["en"].n == 20
    with pytest.raises(FormatError, match="groups"):
        evaluate(model, tokenizer, cases, locality_test=locality, locality_groups={"test": ["a"]})


def test_pool_of_one_is_the_report(model, tokenizer, cases, locality, patches):
    report = evaluate(model, tokenizer, cases, patches, locality_test=locality)
    assert pool([report]) == report.metrics
    with pytest.raises(MismatchError):
        pool([report, evaluate(model, tokenizer, cases, patches)])


def test_table_names_every_language(model, tokenizer, cases, locality, patches):
    from rich.console import Console

    report = evaluate(model, tokenizer, cases, patches, locality_test=locality)
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    assert "needed edits" in text and " en " in text and " zh " in text and "MLG" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda case: case.update(target="MAYBE"), MismatchError, "case 'c0', version 'en'.*MAYBE"),
        (lambda case: case.pop("target"), FormatError, "'c0'.*no target"),
        (lambda case: case.update(id="c1"), FormatError, "twice"),
    ],
)
def test_bad_cases(model, tokenizer, cases, change, error, message):
    change(cases[0])
    with pytest.raises(error, match=message):
        evaluate(model, tokenizer, cases)


def test_bad_locality_and_needed(model, tokenizer, cases, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"language": "en", "text": "w1"}\n{"text": "w1"}\n')
    with pytest.raises(FormatError, match="line 2"):
        evaluate(model, tokenizer, cases, locality_test=path)
    with pytest.raises(FormatError, match="does not exist"):
        evaluate(model, tokenizer, cases, locality_test=tmp_path / "absent.jsonl")
    with pytest.raises(FormatError, match="probe 0"):
        evaluate(model, tokenizer, cases, locality_test={"en": [{"txt": "w1"}]})
    with pytest.raises(MismatchError, match="nowhere"):
        evaluate(model, tokenizer, cases, needed=["nowhere"])
    with pytest.raises(FormatError):
        evaluate(model, tokenizer, [])
