"""The batched losses against their closed forms, written out pair by pair as the reference computes them."""

from __future__ import annotations

import pytest
import torch

from xpatch.editors.t_patcher.losses import activation_loss, memory_loss, task_loss


@pytest.mark.parametrize(
    ("rows", "items", "top"), [(8, 300, 1000), (8, 40, 1000), (1, 50, 1000), (3, 20, 7), (12, 500, 1000)]
)
def test_memory_loss_is_the_mean_of_the_largest_pairs(rows: int, items: int, top: int) -> None:
    own, memory = torch.randn(4, rows), torch.randn(4, items)
    found = memory_loss(own, memory, top=top, margin=3.0)
    for edit in range(4):
        replicated = memory[edit].repeat(rows, 1)  # every batch row sees the whole memory
        first = torch.exp(replicated - own[edit].unsqueeze(1) + 3.0).flatten()
        second = torch.exp(replicated + 3.0).flatten()
        count = min(top, len(first))
        expected = first.topk(count).values.mean() + second.topk(count).values.mean()
        torch.testing.assert_close(found[edit], expected)


def test_eight_copies_cover_a_hundred_and_twenty_five_memory_rows() -> None:
    memory = torch.linspace(0, -8, 400).unsqueeze(0)
    own = torch.ones(1, 8)
    second = memory_loss(own, memory) - torch.exp(memory[:, :125] - 1 + 3).mean()
    torch.testing.assert_close(second, torch.exp(memory[:, :125] + 3).mean(1))


def test_memory_that_is_the_edit_itself_costs_nothing() -> None:
    own = torch.ones(2, 8, requires_grad=True)
    loss = memory_loss(own, torch.full((2, 4), float("-inf")))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert torch.equal(own.grad, torch.zeros(2, 8))


def test_activation_loss_is_the_mean_of_the_five_least_active_rows() -> None:
    z = torch.tensor([[3.0, 1.0, 0.0, -1.0, 2.0, 5.0, 4.0, 6.0]])
    torch.testing.assert_close(
        activation_loss(z), torch.exp(-torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])).mean().unsqueeze(0)
    )


def test_task_loss_equals_the_binary_form_with_confidence_penalty() -> None:
    logits, labels = torch.randn(3, 8, 2), torch.randint(2, (3, 8))
    found = task_loss(logits, labels, torch.ones(3, 8), 0.1)
    score = logits[..., 1] - logits[..., 0]
    binary = torch.nn.functional.binary_cross_entropy_with_logits(score, labels.float(), reduction="none")
    entropy = torch.distributions.Bernoulli(logits=score).entropy()
    torch.testing.assert_close(found, (binary - 0.1 * entropy).mean(1))


def test_task_loss_weighs_rows() -> None:
    logits, labels = torch.randn(2, 3, 4), torch.randint(4, (2, 3))
    weights = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = task_loss(logits, labels, weights, 0.0)
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(found, torch.stack([(2 * each[0, 0] + each[0, 1]) / 3, each[1].mean()]))
