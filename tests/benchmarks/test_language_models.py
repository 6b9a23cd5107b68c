"""The language-model benchmark: what bases are taught, that they are made once, and rows of every kind of model."""

from __future__ import annotations

import json

import pytest
import torch

from xpatch import FormatError
from xpatch.benchmarks import language_models as benchmark
from xpatch.benchmarks import lm_bases, lm_facts, machine, views
from xpatch.models.lm_prompts import Prompts
from xpatch.patches.requests import Probe
from xpatch.zoo.verifier import data

SMALL = {"steps": 4, "memory_rows": 40}


@pytest.fixture
def few(monkeypatch):
    """Few facts and narrow bases."""
    monkeypatch.setattr(lm_facts, "TAUGHT", {"train": 6, "validation": 2, "edit": 3, "test": 3})
    monkeypatch.setattr(lm_bases, "WIDTH", 32)
    monkeypatch.setattr(lm_bases, "VOCABULARY", 400)
    monkeypatch.setattr(lm_bases, "LAYERS", 2)
    lm_facts.taught.cache_clear()
    yield
    lm_facts.taught.cache_clear()


def texts_of(requests):
    return {p.text for r in requests for v in r.versions.values() for p in (v.probe, *v.rephrases)}


@pytest.mark.parametrize("split", list(lm_facts.SPLITS))
def test_edits_memory_and_what_must_stay_are_apart(split):
    asked = lm_facts.protocol(split)
    memory = {probe.text for probes in lm_facts.memory().values() for probe in probes}
    edited = {fact.subject for fact in lm_facts.taught(lm_facts.SPLITS[split].edits)}
    stay = {name for names in asked.groups.values() for name in names}
    assert len(edited) == len(asked.cases) and not edited & stay
    trained, unseen = texts_of(asked.requests), texts_of(asked.cases)
    assert not memory & (trained | unseen)
    own = {v.probe.text for r in asked.requests for v in r.versions.values()}
    assert len(unseen - own) > len(own) and not (unseen - own) & trained
    for part in (asked.locality_train, asked.locality_test):
        assert set(part) == set(data.LANGUAGES)
        assert not {probe.text for probes in part.values() for probe in probes} & (trained | memory)
    truth = {fact.key: fact for fact in lm_facts.taught(lm_facts.SPLITS[split].edits)}
    for request in asked.requests:
        for language, version in request.versions.items():
            assert version.target and version.target != truth[request.id].labels[language][1]
            assert lm_facts.BLANK in version.text


def test_the_splits_share_no_subject():
    subjects = [{fact.subject for fact in lm_facts.taught(split)} for split in lm_facts.TAUGHT]
    assert sum(map(len, subjects)) == len(set().union(*subjects)) == sum(lm_facts.TAUGHT.values())


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", lm_bases.KINDS)
def test_a_base_is_taught_what_an_edit_forces(kind):
    tokenizer = lm_bases.tokenizer_for(kind)
    prompts = Prompts(lm_bases.model_for(kind, tokenizer), tokenizer, "seq2seq" if kind == "t5" else "causal")
    for lesson in lm_facts.lessons():
        told, forced = lm_bases.tokens_of(tokenizer, kind, *lesson), prompts.said(Probe(text=lesson[1]), lesson[2])
        assert (told.read, told.answer, told.shifted) == (forced.ids, forced.labels, forced.decoder)


@pytest.mark.usefixtures("few")
def test_a_batch_asks_for_the_next_token():
    tokenizer = lm_bases.tokenizer_for("gpt2")
    lessons = lm_facts.lessons()[:9]
    inputs, labels = lm_bases.batch([lm_bases.tokens_of(tokenizer, "gpt2", *lesson) for lesson in lessons], 2)
    asked = labels != lm_bases.IGNORED
    ends = asked & (labels == 2)
    assert ends.sum() == 9 and torch.equal(ends.int().argmax(1), inputs["attention_mask"].sum(1) - 1)
    inner = (asked & ~ends)[:, :-1]
    assert torch.equal(labels[:, :-1][inner], inputs["input_ids"][:, 1:][inner])
    said = [tokenizer.decode(row[mask & (row != 2)]).strip() for row, mask in zip(labels, asked, strict=True)]
    assert said == [answer for _, _, answer in lessons]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", lm_bases.KINDS)
def test_a_base_is_made_once_and_measured(kind, tmp_path):
    state, told = torch.random.get_rng_state(), []
    path = lm_bases.make(tmp_path / "bases", kind, steps=2, tell=told.append)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(json.loads((path / "accuracy.json").read_text())) == set(data.LANGUAGES)
    weights = (path / "model.safetensors").read_bytes()
    rows = [row for row in benchmark.METHODS if (row.method, row.preset) in {("mpn", "default"), ("ft", "default")}]
    settings = {"bases": [kind], "rows": rows, "seeds": (0,), "folder": tmp_path / "bases", "progress": False, **SMALL}
    rows_of_neurons = {**settings, "methods": ["mpn"]}
    result = benchmark.run(tmp_path / "r.json", **rows_of_neurons)
    assert (path / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    (row,) = result["bases"][0]["methods"]
    assert row["edit_set"] == 3 and row["restored_bit_exact"] and 0 <= row["unchanged_avg"] <= 100
    again = benchmark.run(tmp_path / "r.json", **rows_of_neurons)
    assert again["bases"] == result["bases"]  # kept, its times too
    assert f"{kind}: MPN (all), default" in views.language_model_table(result).markdown()
    if kind == "llama":  # fine-tuning knows no gated FFN, and says so
        found = benchmark.run(None, **{**settings, "methods": ["ft"], "memory_rows": 40})
        assert not found["bases"][0]["methods"] and found["bases"][0]["skipped"][0]["method"] == "ft"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FormatError, match="no base 'bert'; bases: gpt2, llama, t5"):
        lm_bases.make(tmp_path, "bert")
    with pytest.raises(FormatError, match="no split 'train'; splits: validation, test"):
        lm_facts.protocol("train")
    with pytest.raises(FormatError, match="no method 'nothing'"):
        benchmark.run(methods=["nothing"], folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_header_says_a_command_that_runs(monkeypatch):
    monkeypatch.setattr("sys.argv", [benchmark.__file__, "--json", "r.json"])
    assert machine.header()["command"] == "python -m xpatch.benchmarks.language_models --json r.json"
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/xpatch", "bench", "kernel"])
    assert machine.header()["command"] == "xpatch bench kernel"
