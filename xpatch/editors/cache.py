"""Features of the edited layer, read once per distinct text: what every later training step works on instead of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from xpatch.editors.journal import Journal, known_by
from xpatch.editors.progress import Report
from xpatch.models.features import capture
from xpatch.models.lengths import length_limit
from xpatch.patches.requests import Probe

if TYPE_CHECKING:
    from xpatch.editors.task import Wording


BLOCK = 4096  #: texts of one step of reading, a multiple of all batch sizes
_COLUMNS = ("x", "residual", "base", "logits")


class FeatureCache:
    """Distinct texts -> rows of `x`, `residual`, `base` `[M, D]` and `logits` `[M, C]` at the row the head reads.

    `want` notes texts and returns their row numbers; `fill` reads those not read yet, in batches sorted by length.
    Texts longer than the model allows are cut there; `cut` holds their row numbers.
    """

    def __init__(self, model: Any, tokenizer: Any, site: Any, batch_size: int = 64) -> None:
        self._model, self._tokenizer, self._site = model, tokenizer, site
        self._limit = length_limit(model, tokenizer)
        padded = tokenizer.pad_token_id is not None and getattr(model.config, "pad_token_id", None) is not None
        self._batch_size = batch_size if padded else 1
        self._rows: dict[tuple[str, str | None], int] = {}
        self._read = 0
        self._filled: list[torch.Tensor] = []
        self.cut: set[int] = set()
        self.journal = Journal()

    def __len__(self) -> int:
        return len(self._rows)

    def want(self, probes: Iterable[Probe], limit: int | None = None) -> list[int]:
        """Row numbers of (the first `limit` of) `probes`; equal texts share one."""
        first = itertools.islice(probes, limit)
        return [self._rows.setdefault((probe.text, probe.text_pair), len(self._rows)) for probe in first]

    def asked(self, wording: Wording) -> list[tuple[int, int]]:
        """(row, label) of everything that decides whether a wording is answered: here one row."""
        return [(self.want([wording.probe])[0], wording.label)]

    def fill(self, report: Report) -> None:
        """Read every text wanted since the last call."""
        texts = list(self._rows)[self._read :]
        if not texts:
            return
        encoded = [self._encode(text, pair) for text, pair in texts]
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]["input_ids"]))
        fresh: list[torch.Tensor] = []
        for start in range(0, len(order), BLOCK):
            rows = order[start : start + BLOCK]

            def read(rows: list[int] = rows, start: int = start) -> dict[str, torch.Tensor]:
                found = []
                for first in range(0, len(rows), self._batch_size):
                    batch = self._batch([encoded[index] for index in rows[first : first + self._batch_size]])
                    features = capture(self._model, batch, self._site)
                    found.append([features.x, features.residual, features.base, features.logits])
                    report("reading", min(start + first + self._batch_size, len(order)), len(order))
                return packed([torch.cat(column).detach() for column in zip(*found, strict=True)])

            step = self.journal.once({"texts": known_by([texts[index] for index in rows])}, read)
            columns = unpacked(step.tensors, self._device)
            fresh = fresh or [column.new_empty(len(order), *column.shape[1:]) for column in columns]
            for target, column in zip(fresh, columns, strict=True):
                target[rows] = column
        self._filled = [torch.cat(pair) for pair in zip(self._filled, fresh, strict=True)] if self._filled else fresh
        self._read = len(self._rows)

    def batches(self, rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        """The model's own inputs for the texts of `rows`, in their order: for editors that need a forward of the model."""
        texts = list(self._rows)
        for start in range(0, len(rows), self._batch_size):
            yield self._batch([self._encode(*texts[row]) for row in rows[start : start + self._batch_size]])

    def _batch(self, encoded: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = self._tokenizer.pad(encoded, return_tensors="pt") if self._batch_size > 1 else _single(encoded[0])
        return {name: value.to(self._device) for name, value in batch.items()}

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _encode(self, text: str, pair: str | None) -> dict[str, list[int]]:
        options = {"truncation": True, "max_length": self._limit} if self._limit else {}
        encoded = self._tokenizer(text, pair, **options)
        if self._limit and len(encoded["input_ids"]) == self._limit:
            self.cut.add(self._rows[text, pair])
        return {name: encoded[name] for name in encoded if name in self._tokenizer.model_input_names}

    @property
    def x(self) -> torch.Tensor:
        """Inputs of the FFN `[M, D]`."""
        return self._filled[0]

    @property
    def residual(self) -> torch.Tensor:
        """What the FFN's output is added to `[M, D]`."""
        return self._filled[1]

    @property
    def base(self) -> torch.Tensor:
        """The FFN's own output, with patches the model already carries `[M, D]`."""
        return self._filled[2]

    @property
    def logits(self) -> torch.Tensor:
        """The model's answer `[M, C]`."""
        return self._filled[3]

    def answers(self, rows: torch.Tensor) -> torch.Tensor:
        """The model's answer to row numbers `[M]` -> `[M, C]`."""
        return self.logits[rows]


def packed(columns: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """x, residual, base and what follows, by name; the residual is left out where it is x (as in BERT)."""
    found = dict(zip(_COLUMNS, columns, strict=False))
    if torch.equal(found["x"], found["residual"]):
        del found["residual"]
    return found


def unpacked(tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """The columns of `packed`, on `device`."""
    found = {name: tensor.to(device) for name, tensor in tensors.items()}
    found.setdefault("residual", found["x"])
    return [found[name] for name in _COLUMNS if name in found]


def _single(encoded: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values]) for name, values in encoded.items()}
