"""A long edit call that is interrupted goes on where it was, bit for bit, or says why it cannot."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from tests.editors import lm
from tests.editors.conftest import LABELS, make_requests, memory, model_of, quick_edit, tokenizer_of
from tests.editors.test_many_edits import QUICK as DRAWN
from tests.editors.test_many_edits import ask, make
from xpatch.editors.call import Call
from xpatch.editors.checkpoint import CARD, RESULT, Checkpoint
from xpatch.editors.t_patcher import editor as neurons
from xpatch.editors.t_patcher.config import DEFAULT
from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.patches.requests import EditRequest
from xpatch.patches.types import PatchSet

ROOT = Path(__file__).parents[2]
METHODS = ("t-patcher", "mpn-only", "mpn", "mpn-masked")


class Stop(Exception):
    pass


class Heard:
    """A progress callable that notes what it hears, and stops the call after so many reports of a stage."""

    def __init__(self, stage: str = "", after: int = -1) -> None:
        self.events: list[tuple[str, int, int]] = []
        self._stage, self._after = stage, after

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.events.append((stage, done, total))
        if self._after >= 0 and sum(event[0] == self._stage for event in self.events) > self._after:
            raise Stop

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for stage, _, _ in self.events))


@pytest.fixture
def bert() -> tuple[Any, Any, list[EditRequest]]:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    return model, tokenizer, make_requests(model, tokenizer, 5)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many edits each step that was really trained had."""
    counts: list[int] = []
    train = neurons.train

    def counted(problem: Any, *rest: Any) -> Any:
        made = train(problem, *rest)
        counts.append(len(problem.x))
        return made

    monkeypatch.setattr(neurons, "train", counted)
    return counts


def same(one: PatchSet, other: PatchSet) -> bool:
    """Equal in everything but times: tensors to the bit, and what the ledger says of each edit."""
    told = [[(r.id, r.status, r.message, r.rows, r.hyperparameters, r.seed) for r in found] for found in (one, other)]
    tensors = all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    return told[0] == told[1] and tensors and one.fingerprint == other.fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_is_stopped_at_every_chunk_gives_what_a_whole_one_gives(
    method: str, bert: Any, tmp_path: Path, trained: list[int]
) -> None:
    options = {"chunk": 2, "steps": 60}
    whole = quick_edit(*bert, method, **options)
    needed, folder = list(trained), tmp_path / "half"
    trained.clear()
    resumed = []
    for _ in range(40):
        heard = Heard("training", 60)  # a chunk's own 60 steps, and then no more
        try:
            parts = quick_edit(*bert, method, **options, checkpoint=folder, progress=heard)
            break
        except Stop:
            resumed += [event for event in heard.events if event[0] == "resuming"]
    assert same(whole, parts) and trained == needed  # each step was trained once
    assert {record.status for record in whole} <= {"edited", "already-right"} and len(needed) >= 2
    assert resumed and {total for _, _, total in resumed} == {5} and resumed[0][1] == 2
    trained.clear()
    heard = Heard()
    again = quick_edit(*bert, method, **options, checkpoint=folder, progress=heard)
    assert same(whole, again) and not trained and heard.events == [("resuming", 5, 5)]
    assert again.edits == parts.edits  # times too: it is the same result
    assert sorted(path.name for path in folder.iterdir()) == [CARD, RESULT]


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_language_models_go_on_too(kind: str, tmp_path: Path, trained: list[int]) -> None:
    model, tokenizer = lm.model_of(kind), lm.tokenizer_of(kind)
    requests = lm.make_requests(kind)
    options = {**lm.QUICK, "memory": lm.memory(), "chunk": 1, "steps": 60}
    whole = xpatch.edit(model, tokenizer, requests, **options)
    needed = list(trained)
    trained.clear()
    options["checkpoint"] = tmp_path / "half"
    with pytest.raises(Stop):
        xpatch.edit(model, tokenizer, requests, **{**options, "progress": Heard("training", 90)})
    heard = Heard()
    assert same(whole, xpatch.edit(model, tokenizer, requests, **{**options, "progress": heard}))
    assert trained == needed and "resuming" in heard.stages and "reading" not in heard.stages


@pytest.mark.parametrize("stop", [0, 3, 7, 11])
def test_repairs_rescues_and_lost_edits_come_out_as_they_would_have(stop: int, tmp_path: Path) -> None:
    """Edits that contradict each other: rounds of repair, neurons taken out again, failed and lost edits."""
    requests = [ask(number) for number in range(9)] + [ask(number, twin=True, flip=True) for number in range(5)]
    config = DEFAULT.model_copy(update={**DRAWN, "steps": 15, "chunk": 4, "rounds": 2})
    run, whole = make(requests, config)
    assert {outcome.status for outcome in whole.outcomes} & {"failed", "lost"}

    class Stopping(Checkpoint):
        def once(self, key: Any, make: Any) -> Any:
            if self._next == stop:
                raise Stop
            return super().once(key, make)

    with pytest.raises(Stop):
        make(requests, config, journal=Stopping(tmp_path, call()))
    assert len(list(tmp_path.glob("step-*"))) == stop
    again, parts = make(requests, config, journal=Checkpoint(tmp_path, call()))
    assert len(list(tmp_path.glob("step-*"))) > 11  # the last stop lies within the procedure
    for one, other in zip(whole.outcomes, parts.outcomes, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
    assert all(
        torch.equal(getattr(run.neurons, name), getattr(again.neurons, name))
        for name in ("keys", "bias", "values", "owner")
    )
    assert torch.equal(run.standing._sums, again.standing._sums)


def call() -> Call:
    """Any call's card."""
    from xpatch.editors.call import call_of
    from xpatch.patches.identity import identify

    return call_of("mpn", {"steps": 15}, 0, None, [ask(0)], {}, identify(model_of("bert", 2)), (), "cpu")


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from tests.editors.conftest import make_requests, model_of, quick_edit, tokenizer_of
model, tokenizer = model_of("bert"), tokenizer_of("bert")
heard = 0
def report(stage, done, total):
    global heard
    heard += stage == "training"
    if heard == 100:
        os.kill(os.getpid(), signal.SIGKILL)
quick_edit(model, tokenizer, make_requests(model, tokenizer, 5), "mpn", chunk=2, steps=60, checkpoint=sys.argv[1], progress=report)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_is_gone_on_from(bert: Any, tmp_path: Path, trained: list[int]) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=300
    )
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-00000{n}.safetensors" for n in (0, 1)]
    parts = quick_edit(*bert, "mpn", chunk=2, steps=60, checkpoint=tmp_path)
    went_on = sum(trained)
    trained.clear()
    whole = quick_edit(*bert, "mpn", chunk=2, steps=60)
    assert same(whole, parts) and went_on == sum(trained) - 2


def interrupted(bert: Any, folder: Path, **options: Any) -> None:
    with pytest.raises(Stop):
        quick_edit(
            *bert,
            "mpn",
            **{"chunk": 1, "steps": 20, "checkpoint": folder, "progress": Heard("training", 70), **options},
        )
    assert len(list(folder.glob("step-*"))) >= 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 30}, "setting steps was 20, now 30"),
        ({"preset": "paper"}, "setting preset was 'default', now 'paper'"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"languages": ["en", "de"]}, "languages was not given, now ['en', 'de']"),
        ({"memory": {"en": ["name1 in city1"]}}, "the memory's texts are others"),
        ({"method": "mpn-only"}, "method was 'mpn', now 'mpn-only'"),
    ],
)
def test_another_call_is_refused_and_told_what_differs(
    change: dict[str, Any], said: str, bert: Any, tmp_path: Path
) -> None:
    interrupted(bert, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = {"chunk": 1, "steps": 20, "checkpoint": tmp_path, **change}
    with pytest.raises(ConflictError) as caught:
        quick_edit(*bert, **{"method": "mpn", **options})
    message = str(caught.value)
    assert said in message and str(tmp_path) in message and "remove this one to begin anew" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_requests_and_models_are_refused(bert: Any, tmp_path: Path) -> None:
    model, tokenizer, requests = bert
    interrupted(bert, tmp_path)

    def refusal(model: Any, requests: Any) -> str:
        with pytest.raises(ConflictError) as caught:
            quick_edit(model, tokenizer, requests, "mpn", chunk=1, steps=20, checkpoint=tmp_path)
        return str(caught.value)

    assert "requests were 5, now 4" in refusal(model, requests[:4])
    assert "request 2 was 'edit-1', now 'edit-2'" in refusal(model, [requests[0], *requests[2:], requests[1]])
    other = next(name for name in LABELS if name != requests[3].target)
    changed = requests[3].model_copy(update={"target": other})
    assert "request 4, 'edit-3', was another" in refusal(model, [*requests[:3], changed, requests[4]])
    small = quick_edit(model, tokenizer, requests[:1], "t-patcher", steps=5, keep_failed=True)
    xpatch.apply(model, small, name="small")
    assert f"patches on the model were none, now {small.fingerprint[:12]}" in refusal(model, requests)
    xpatch.remove(model)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    assert "the model is another" in refusal(model, requests)
    with torch.no_grad():
        model.classifier.bias.sub_(1)


def test_a_damaged_step_is_trained_again(bert: Any, tmp_path: Path, trained: list[int]) -> None:
    whole = quick_edit(*bert, "mpn", chunk=1, steps=20)
    needed = len(trained)
    interrupted(bert, tmp_path)
    kept = sorted(tmp_path.glob("step-*"))
    kept[2].write_bytes(kept[2].read_bytes()[:-7])  # the first was read, the second trained
    (tmp_path / "step-000009.safetensors.tmp").write_bytes(b"half")
    trained.clear()
    with pytest.warns(UserWarning, match=r"step-000002.safetensors is damaged.*made again"):
        parts = quick_edit(*bert, "mpn", chunk=1, steps=20, checkpoint=tmp_path)
    assert same(whole, parts) and len(trained) == needed - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, RESULT]


def test_steps_of_other_edits_are_trained_again(bert: Any, tmp_path: Path) -> None:
    """What another machine's rounding leads to may not be mixed up with what this one needs."""
    whole = quick_edit(*bert, "mpn", chunk=1, steps=20)
    interrupted(bert, tmp_path)
    _, first, second, *_ = sorted(tmp_path.glob("step-*"))
    first.replace(tmp_path / "other")
    second.replace(first)
    (tmp_path / "other").replace(second)
    with pytest.warns(UserWarning, match="is another than expected"):
        parts = quick_edit(*bert, "mpn", chunk=1, steps=20, checkpoint=tmp_path)
    assert same(whole, parts)


def test_a_damaged_card_or_result_says_what_to_do(bert: Any, tmp_path: Path) -> None:
    quick_edit(*bert, "mpn", steps=5, checkpoint=tmp_path)
    tensors = tmp_path / RESULT / "patch_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(FormatError, match="its result cannot be read.*begin anew"):
        quick_edit(*bert, "mpn", steps=5, checkpoint=tmp_path)
    (tmp_path / CARD).write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"call.json cannot be read.*begin anew"):
        quick_edit(*bert, "mpn", steps=5, checkpoint=tmp_path)


def test_folders_that_are_none_are_refused(bert: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for folder, error, said in (
        (tmp_path / "file", FormatError, "is a file"),
        (tmp_path, ConflictError, "holds other files \\(file"),
        ("s3://bucket/half", FormatError, "expected a folder on disk, found the URL"),
    ):
        with pytest.raises(error, match=said):
            quick_edit(*bert, "mpn", checkpoint=folder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{CARD}.tmp").write_text("half", encoding="utf-8")
    assert quick_edit(*bert, "mpn", steps=5, checkpoint=tmp_path / "new").edits


@pytest.mark.parametrize("method", ["ft", "ft-l", "calinet", "grace"])
def test_methods_that_cannot_go_on_say_so(method: str, bert: Any, tmp_path: Path) -> None:
    assert {name for name, info in xpatch.methods().items() if info.resumes} == set(METHODS)
    with pytest.raises(MismatchError, match="mpn, mpn-masked, mpn-only, t-patcher"):
        quick_edit(*bert, method, checkpoint=tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_requests_that_are_all_rejected_leave_a_result_too(bert: Any, tmp_path: Path) -> None:
    model, tokenizer, _ = bert
    for _ in range(2):
        found = xpatch.edit(
            model, tokenizer, [{"id": "a", "text": "qa", "target": "no label"}], memory=memory(), checkpoint=tmp_path
        )
        assert [record.status for record in found] == ["rejected"]
