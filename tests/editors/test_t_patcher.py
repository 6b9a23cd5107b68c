"""Transformer-Patcher's steps: the start, the patched forward, need-edit, the stopping rule, repair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.editors.conftest import make_requests, memory, model_of, tokenizer_of
from xpatch.editors.cache import FeatureCache
from xpatch.editors.inputs import as_memory, labels_of, resolve_edits
from xpatch.editors.samplers import Sampler, all_parallel, one_parallel, own_language
from xpatch.editors.t_patcher import config as configs
from xpatch.editors.t_patcher.editor import _Run
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.t_patcher.train import Problem, logits_of, train
from xpatch.editors.task import Task
from xpatch.models.heads import head_of
from xpatch.ops.reference import patch_ffn


def run_of(model: Any, tokenizer: Any, requests: Any, sampler: Sampler = own_language, **settings: Any) -> _Run:
    head = head_of(model)
    edits = resolve_edits(requests, labels_of(model, head.labels), None)
    cache = FeatureCache(model, tokenizer, head.site)
    task = Task(model, head.site, head, edits, as_memory(memory(), edits), cache, 0, lambda *event: None)
    config = configs.PAPER.model_copy(update={"steps": 150, **settings})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return _Run(task, config, "t-patcher", sampler)


def test_the_pre_activation_starts_at_one_on_its_own_row(model: Any, tokenizer: Any) -> None:
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 4))
    problem = run.problem([0, 1, 2, 3], 1, 0)
    z = torch.einsum("erd,epd->erp", problem.x, problem.keys) + problem.bias.unsqueeze(1)
    torch.testing.assert_close(z, torch.ones_like(z))
    effective = problem.values * configs.PAPER.amplify
    assert 8 < effective.std() < 12  # u ~ N(0, 1), a = 10


def test_patched_ffn_is_the_base_and_a_side_path(model: Any, tokenizer: Any) -> None:
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 3))
    site, width = run.task.site, run.task.cache.x.shape[1]
    neurons = Neurons(torch.randn(5, width), torch.randn(5), torch.randn(5, width), torch.zeros(5), run.activation)
    x = run.task.cache.x
    torch.testing.assert_close(
        neurons.output(x, block=4), patch_ffn(x, neurons.keys, neurons.bias, neurons.values, site.activation)
    )
    # Widening the FFN by the same neurons gives the same output, as equation 8 says.
    up, down = model.get_submodule(site.up), model.get_submodule(site.down)
    conv = type(up).__name__ == "Conv1D"
    first, second = (up.weight.T, down.weight.T) if conv else (up.weight, down.weight)
    inner = torch.nn.functional.gelu(
        x @ torch.cat((first, neurons.keys)).T + torch.cat((up.bias, neurons.bias)),
        approximate="tanh" if conv else "none",
    )
    widened = inner @ torch.cat((second, neurons.values.T), dim=1).T + down.bias
    torch.testing.assert_close(run.task.cache.base + neurons.output(x), widened, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "trained", "needed_when_wrong_in"),
    [(own_language, 1, ("en",)), (one_parallel, 2, ("en", "sampled")), (all_parallel, 3, ("en", "de", "xx"))],
)
def test_need_edit_follows_the_sampler(sampler: Sampler, trained: int, needed_when_wrong_in: tuple[str, ...]) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 8), sampler)
    for edit, plan in enumerate(run.plans):
        assert plan.required == trained == len(plan.chosen) and plan.chosen[0].language == "en"
        answers = run.task.cache.logits[list(plan.rows)].argmax(-1).tolist()
        wrong = [w.language for w, answer in zip(plan.chosen, answers, strict=True) if answer != w.label]
        assert run.right([edit])[edit] == (not wrong)
    again = run_of(model, tokenizer, make_requests(model, tokenizer, 8), sampler)
    assert [plan.chosen for plan in run.plans] == [plan.chosen for plan in again.plans]
    if sampler is one_parallel:
        assert {plan.chosen[1].language for plan in run.plans} == {"de", "xx"}


def test_rephrases_are_trained_on_only_when_the_preset_says_so() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 2)
    assert len(run_of(model, tokenizer, requests, all_parallel).plans[0].rows) == 3
    plan = run_of(model, tokenizer, requests, all_parallel, rephrases=True).plans[0]
    assert len(plan.rows) == 6 and plan.required == 3
    assert len(run_of(model, tokenizer, requests, own_language, rephrases=True).plans[0].rows) == 2


def test_edited_texts_are_never_memory_and_others_rows_are() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3)
    run = run_of(model, tokenizer, requests)
    own = {plan.rows[0] for plan in run.plans}
    held = {tuple(row) for row in torch.cat((run.memory, run.held)).tolist()}
    assert held.isdisjoint(tuple(run.task.cache.x[row].tolist()) for row in own)
    run.accepted = [0, 1, 2]
    problem = run.problem([0, 2], 1, 0)
    assert len(problem.mates) == 3
    assert problem.foreign.sum(1).tolist() == [2, 2]


def test_stopping_rule_waits_for_150_steps() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 2), steps=400)
    shares: list[float] = []
    config = run.config.model_copy(update={"memory_weight": 0.0})
    train(run.problem([0, 1], 1, 0), config, run.task.head.tail, run.activation, torch.Generator(), shares.append)
    assert 150 <= len(shares) <= 400
    assert shares == sorted(shares)


def test_side_by_side_equals_alone() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 4), steps=30, early_stop=False)
    run.accepted = [0, 1, 2, 3]
    together = _train(run, run.problem([0, 1, 2, 3], 1, 0))
    for edit in range(4):
        alone = _train(run, run.problem([edit], 1, 0))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[edit], part[0], rtol=1e-3, atol=1e-3)


def _train(run: _Run, problem: Problem) -> tuple[torch.Tensor, ...]:
    return train(
        problem, run.config, run.task.head.tail, run.activation, torch.Generator().manual_seed(0), lambda share: None
    )


def test_trained_neurons_are_what_the_model_computes_with(model: Any, tokenizer: Any) -> None:
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 2))
    problem = run.problem([0, 1], 1, 0)
    keys, bias, values = _train(run, problem)
    logits, _ = logits_of(problem, run.task.head.tail, run.activation, keys, bias, values)
    run.neurons.add(torch.tensor([0]), keys[:1], bias[:1], values[:1])
    row = list(run.plans[0].rows)
    output = run.task.cache.base[row] + run.neurons.output(run.task.cache.x[row])
    torch.testing.assert_close(
        run.task.head.tail(output, run.task.cache.residual[row]), logits[0, :1], rtol=1e-4, atol=1e-4
    )


def test_repair_trains_what_the_others_disturb() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    run = run_of(model, tokenizer, make_requests(model, tokenizer, 4), activation="relu", chunk=1)
    product = run.product()
    assert [outcome.status for outcome in product.outcomes] == ["edited"] * 4
    disturbance = torch.randn(1, 1, run.neurons.keys.shape[1]) * 50
    run.neurons.add(torch.tensor([99]), torch.zeros_like(disturbance), torch.ones(1, 1), disturbance)
    if not all(run.right(run.accepted).values()):
        run.repair(4)
        assert all(run.right(run.accepted).values())
