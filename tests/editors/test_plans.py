"""Which wrong tokens get neurons of their own, and which share one."""

from __future__ import annotations

import torch

from tests.editors.lm import model_of, tokenizer_of
from xpatch.editors.t_patcher.losses import task_loss
from xpatch.editors.t_patcher.plans import Plan, slots_of
from xpatch.editors.task import Edit, Wording
from xpatch.patches.requests import EditRequest, Probe


def plan_of(*texts: list[int], required: int | None = None) -> Plan:
    """A plan whose texts have these labels; the first `required` texts decide."""
    request = EditRequest(id="a", versions={"en": {"text": "x"}})
    chosen = tuple(
        Wording(Probe(text="x"), -1, code, "y") for code, _ in zip(("en", "de", "fr"), texts[:required], strict=False)
    )
    labels = [label for text in texts for label in text]
    owners = [number for number, text in enumerate(texts) for _ in text]
    count = sum(map(len, texts[:required]))
    return Plan(
        Edit(request, chosen, (), ()), chosen, tuple(range(len(labels))), tuple(labels), tuple(owners), count, ()
    )


def test_each_wrong_token_of_the_own_text_has_a_slot_up_to_the_most() -> None:
    plan = plan_of([1, 2, 2, 3, 4, 5, 6])
    slots = slots_of(plan, [0, 2, 0, 0, 0, 0, 0], 5)
    assert slots.anchors == (0, 2, 3, 4, 5)
    assert slots.of == (0, None, 1, 2, 3, 4, None)


def test_other_languages_share_where_the_same_token_is_to_be_said() -> None:
    plan = plan_of([1, 2], [1, 3], [1, 2])
    assert slots_of(plan, [0, 0, 0, 0, 0, 0], 5).of == (0, 1, 0, 2, 0, 1)
    assert slots_of(plan, [1, 2, 0, 0, 1, 2], 5).of == (None, None, 0, 1, None, None)


def test_rephrases_share_but_get_none_of_their_own() -> None:
    plan = plan_of([1, 2], [1, 2], required=1)
    assert plan.required == 2
    assert slots_of(plan, [0, 2], 5) == slots_of(plan, [0, 2], 1)
    assert slots_of(plan, [0, 2], 5).of == (0, None, 0, None)


def test_an_edit_that_is_right_by_now_has_one_slot() -> None:
    assert slots_of(plan_of([1, 2]), [1, 2], 5).anchors == (0,)


def test_wrong_languages_are_named_once_in_order() -> None:
    plan = plan_of([1, 2], [1, 3], [4])
    assert plan.wrong_languages([1, 2, 1, 3, 4]) == []
    assert plan.wrong_languages([0, 0, 1, 0, 9]) == ["en", "de", "fr"]


def test_label_smoothing_is_torchs() -> None:
    logits, labels = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(task_loss(logits, labels, torch.ones(2, 3), 0.0, 0.1), expected.view(2, 3).mean(1))


def test_each_token_weighs_the_same_and_a_slots_neurons_fire_at_its_tokens() -> None:
    """The problem of two edits of unlike length: repeated rows weigh nothing, `own` reads only the neurons that must fire."""
    from xpatch.editors.samplers import own_language
    from xpatch.editors.subject import LanguageModel
    from xpatch.editors.t_patcher import config as configs
    from xpatch.editors.t_patcher.editor import _Run
    from xpatch.editors.task import Task

    model = model_of("gpt2")
    subject = LanguageModel(model, tokenizer_of("gpt2"), "causal")
    texts = {"a": "new city1 city2", "b": "old city3"}
    edits = [
        subject.resolve(EditRequest(id=id, versions={"en": {"text": f"name1 {id}"[:5]}}, target=target), None)
        for id, target in texts.items()
    ]
    bench = subject.bench(edits)
    task = Task(model, subject.site, bench.head, edits, {}, bench.cache, 0, lambda *event: None, bench.decoding)
    run = _Run(task, configs.PAPER_LM, "t-patcher", own_language)
    run.accepted = [0, 1]
    for edit in run.accepted:
        run.slots[edit] = slots_of(run.plans[edit], run.standing.answers(edit), 2)
        rows = list(run.plans[edit].rows)
        answers = bench.head.tail(bench.cache.base[rows], bench.cache.residual[rows]).argmax(-1)
        assert len(rows) > 1 and run.standing.answers(edit) == answers.tolist()
    problem = run.problem([0, 1], 2, 0)
    assert problem.weights is not None and problem.weights.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert problem.acts is not None and problem.acts.shape == (2, 8)
    z = torch.einsum("erd,epd->erp", problem.x, problem.keys) + problem.bias.unsqueeze(1)
    torch.testing.assert_close(problem.own(z, torch.arange(3)), torch.ones(2, 8))
