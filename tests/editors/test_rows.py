"""What the memory holds, for every editor on cached rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.editors.conftest import make_requests, model_of, task_of, tokenizer_of
from xpatch.editors.ft.config import FineTuneConfig
from xpatch.editors.rows import EditRows
from xpatch.editors.samplers import own_language
from xpatch.editors.t_patcher import rows as neuron_rows
from xpatch.editors.t_patcher.config import NeuronConfig
from xpatch.patches.requests import Probe


def fine_tuning(task):
    return EditRows(task, "ft", FineTuneConfig(memory_weight=1.0, memory_languages="all"), memory=True).memory.tolist()


def neurons(task):
    config = NeuronConfig(memory_languages="all", early_stop=False)
    found = neuron_rows.EditRows(task, config, "relu", "t-patcher", own_language).memory
    return [i for i, x in enumerate(task.cache.x) if (found == x).all(1).any()]


@pytest.mark.parametrize("of", [fine_tuning, neurons])
def test_nothing_an_edit_is_about_must_stay(of):
    """Also what is not trained on: the text in another language, and a rephrase."""
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    task = task_of(model, tokenizer, make_requests(model, tokenizer, 2))
    edit = task.edits[0]
    about = [*(wording.probe for wording in (*edit.versions, *edit.rephrases))]
    assert len({probe.text for probe in about}) > 2 and edit.versions[1].language != edit.versions[0].language
    other = Probe(text="name6 was born in city6")
    task = replace(task, memory={"en": [*about, other], "de": [*about]})
    assert of(task) == task.cache.want([other])
