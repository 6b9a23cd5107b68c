"""Algorithm 1 of the paper, rule by rule."""

from __future__ import annotations

import pytest
import torch

from xpatch.editors.grace.codebook import Codebook


def point(*coordinates: float) -> torch.Tensor:
    return torch.tensor(coordinates)


def free(key: torch.Tensor, label: int) -> float:
    return float("inf")


def book_of(*entries: tuple[torch.Tensor, int]) -> Codebook:
    book = Codebook(2, torch.device("cpu"))
    for number, (key, label) in enumerate(entries):
        book.take(key, label, (number, number), free, 1.0)
    return book


def test_an_empty_codebook_lets_no_row_in() -> None:
    nearest, here = Codebook(2, torch.device("cpu")).look(torch.randn(3, 2))
    assert not here.any() and len(nearest) == 3


def test_far_rows_get_keys_of_their_own() -> None:
    book = book_of((point(0, 0), 0), (point(2.5, 0), 0), (point(0, 2.5), 1))
    assert book.radii.tolist() == [1, 1, 1] and book.labels == [0, 0, 1]
    nearest, here = book.look(torch.stack((point(0.9, 0), point(1.2, 0), point(2.4, 0.5), point(0, 3.5))))
    assert here.tolist() == [True, False, True, True] and nearest.tolist() == [0, 0, 1, 2]


def test_a_like_label_expands_the_ball_just_to_the_row() -> None:
    book = book_of((point(0, 0), 0))
    assert book.take(point(1.5, 0), 0, (1, 1), free, 1.0) == (0, False)
    assert book.radii.tolist() == pytest.approx([1.5], rel=1e-5) and book.users == [[(0, 0), (1, 1)]]
    assert book.look(point(1.5, 0)[None])[1].item()
    assert book.take(point(0.5, 0), 0, (2, 2), free, 1.0) == (0, False)
    assert book.radii.tolist() == pytest.approx([1.5], rel=1e-5)  # inside already


def test_another_label_splits_the_way() -> None:
    book = book_of((point(0, 0), 0))
    assert book.take(point(1.6, 0), 1, (1, 1), free, 1.0) == (1, True)
    assert book.radii.tolist() == pytest.approx([0.8 - 1e-5, 0.8])
    nearest, here = book.look(torch.stack((point(0.79, 0), point(0.81, 0))))
    assert nearest.tolist() == [0, 1] and here.all()


def test_the_same_row_with_another_label_takes_the_key_over() -> None:
    book = book_of((point(1, 1), 0))
    assert book.take(point(1, 1), 1, (1, 1), free, 1.0) == (0, False)
    assert book.labels == [1] and book.radii.tolist() == [1] and book.users == [[(0, 0), (1, 1)]]


def test_no_rule_goes_beyond_the_limit() -> None:
    book = Codebook(2, torch.device("cpu"))
    book.take(point(0, 0), 0, (0, 0), lambda key, label: 0.5, 1.0)
    assert book.radii.tolist() == [0.5]
    # The like label is near enough to expand, but may not: a key more.
    assert book.take(point(0.9, 0), 0, (1, 1), lambda key, label: 0.5, 1.0) == (1, True)
    assert book.take(point(0.9, 0.6), 1, (2, 2), lambda key, label: 0.2, 1.0) == (2, True)
    assert book.radii.tolist() == pytest.approx([0.5, 0.2, 0.2])
