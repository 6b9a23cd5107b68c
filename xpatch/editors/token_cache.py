"""Features at token positions: what language models are edited on. Tokens in one context, whoever asks for them, are one row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from xpatch.editors.cache import BLOCK, FeatureCache, packed, unpacked
from xpatch.editors.journal import known_by
from xpatch.editors.progress import Report
from xpatch.editors.task import Wording
from xpatch.errors import MismatchError
from xpatch.models.lm_decoding import Greedy
from xpatch.models.lm_heads import LMHead, capture_tokens
from xpatch.models.lm_prompts import Forced, Prompts
from xpatch.patches.requests import Probe

_TEXTS = BLOCK // 8  # of one step of reading: every token is a row
ANSWER = 16  #: tokens of a model's own answer that stand for what it does with a text


class TokenCache(FeatureCache):
    """Tokens -> rows of `x`, `residual`, `base` `[M, D]` at the final FFN of a language model.

    `asked` gives the rows of a wording's target with their labels; `want` those of texts that must stay: the target's tokens of a probe
    with a target, else every token of the text, or of the model's own greedy answer where it has an encoder. Nothing is said at a
    text's first token, nor at a decoder's where generation forces what follows (BART in Transformer-Patcher's zsRE memory): those are
    left out. `fill` reads them.
    """

    def __init__(
        self, model: Any, tokenizer: Any, head: LMHead, prompts: Prompts, greedy: Greedy, batch_size: int = 64
    ) -> None:
        super().__init__(model, tokenizer, head.site, batch_size)
        self._head, self._prompts, self._greedy = head, prompts, greedy
        self._tokens: dict[tuple[Any, ...], int] = {}
        self._places: list[tuple[Forced, int]] = []

    def __len__(self) -> int:
        return len(self._places)

    def asked(self, wording: Wording) -> list[tuple[int, int]]:
        """(row, label) of every token of the wording's target."""
        assert wording.target is not None  # resolved for a language model
        said = self._prompts.said(wording.probe, wording.target, wording.language)
        return [(self._row(said, place), label) for place, label in zip(said.positions, said.labels, strict=True)]

    def want(self, probes: Iterable[Probe], limit: int | None = None) -> list[int]:
        """Row numbers of what must stay of `probes`, at most `limit`; equal tokens in equal contexts share one."""
        found: dict[int, None] = {}
        pending: list[Probe] = []
        for probe in probes:
            if limit is not None and len(found) + len(pending) * ANSWER // 2 >= limit:
                break
            if probe.target is None and self._head.kind == "seq2seq":
                pending.append(probe)
                continue
            kept = self._kept(probe)
            found.update(dict.fromkeys(self._row(kept, place) for place in kept.positions if place or kept.decoder))
        if pending:
            for probe, answer in zip(pending, self._answers(pending), strict=True):
                kept = self._prompts.heard(probe, answer)
                found.update(dict.fromkeys(self._row(kept, place) for place in kept.positions))
        return list(found)[:limit]

    def _answers(self, probes: list[Probe]) -> list[tuple[int, ...]]:
        """The model's own answers, in blocks that a call which was interrupted need not ask for again."""
        ids = [self._prompts.heard(probe).ids for probe in probes]
        found: list[tuple[int, ...]] = []
        for start in range(0, len(ids), BLOCK):
            block = ids[start : start + BLOCK]

            def ask(block: list[tuple[int, ...]] = block) -> dict[str, torch.Tensor]:
                answers = self._greedy.answers(block, ANSWER)
                flat = torch.tensor([token for answer in answers for token in answer])
                return {"tokens": flat, "lengths": torch.tensor([len(answer) for answer in answers])}

            made = self.journal.once({"answers": known_by(block)}, ask).tensors
            found += [tuple(part.tolist()) for part in made["tokens"].split(made["lengths"].tolist())]
        return found

    def _kept(self, probe: Probe) -> Forced:
        if probe.target is not None:
            try:
                return self._prompts.said(probe, probe.target)
            except MismatchError:  # no answer this model could give: the text itself
                pass
        return self._prompts.heard(probe)

    def fill(self, report: Report) -> None:
        """Read every token wanted since the last call, texts of like length together."""
        if self._read == len(self._places):
            return
        wanted: dict[Forced, list[int]] = {}
        for row in range(self._read, len(self._places)):
            wanted.setdefault(self._places[row][0], []).append(row)
        order = sorted(wanted, key=lambda one: (len(one.ids), len(one.decoder or ())))
        places = {one: sorted((self._places[row][1], row) for row in found) for one, found in wanted.items()}
        rows = [row for one in order for _, row in places[one]]
        found: list[list[torch.Tensor]] = []
        for start in range(0, len(order), _TEXTS):
            block = order[start : start + _TEXTS]

            def read(block: list[Forced] = block, start: int = start) -> dict[str, torch.Tensor]:
                columns: list[list[torch.Tensor]] = []
                for first in range(0, len(block), self._batch_size):
                    chunk = block[first : first + self._batch_size]
                    columns.append(self._features(chunk, [[place for place, _ in places[one]] for one in chunk]))
                    report("reading", min(start + first + self._batch_size, len(order)), len(order))
                return packed([torch.cat(column).detach() for column in zip(*columns, strict=True)])

            asked = [(one.ids, one.decoder, one.types, [place for place, _ in places[one]]) for one in block]
            found.append(unpacked(self.journal.once({"tokens": known_by(asked)}, read).tensors, self._device))
        back = torch.empty(len(rows), dtype=torch.long)
        back[torch.tensor(rows) - self._read] = torch.arange(len(rows))
        fresh = [torch.cat(column)[back.to(self._device)] for column in zip(*found, strict=True)]
        self._filled = [torch.cat(pair) for pair in zip(self._filled, fresh, strict=True)] if self._filled else fresh
        self._read = len(self._places)

    def _features(self, chunk: list[Forced], places: list[list[int]]) -> list[torch.Tensor]:
        """x, residual, base of the tokens at `places` of each text, in this order."""
        inputs = model_inputs(chunk, self._device)
        chosen = torch.zeros(inputs.get("decoder_input_ids", inputs["input_ids"]).shape, dtype=torch.bool)
        for number, own in enumerate(places):
            chosen[number, own] = True
        features = capture_tokens(self._model, inputs, self._head, chosen.to(self._device))
        return [features.x, features.residual, features.base]

    @property
    def logits(self) -> torch.Tensor:
        """The model's answers `[M, V]`, computed anew: over a large vocabulary they are not kept."""
        with torch.no_grad():
            return self._head.tail(self.base, self.residual)

    def answers(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._head.tail(self.base[rows], self.residual[rows])

    def _row(self, one: Forced, place: int) -> int:
        row = self._tokens.setdefault(one.key(place, self._head.kind), len(self._places))
        if row == len(self._places):
            self._places.append((one, place))
        if one.cut:
            self.cut.add(row)
        return row


def model_inputs(chunk: list[Forced], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: the mask hides padding from encoders, and a decoder's tokens do not see what follows them."""
    inputs = {
        "input_ids": [one.ids for one in chunk],
        "decoder_input_ids": [one.decoder for one in chunk if one.decoder],
        "token_type_ids": [one.types or (0,) * len(one.ids) for one in chunk if any(other.types for other in chunk)],
    }
    batch: dict[str, torch.Tensor] = {}
    for name, rows in inputs.items():
        if rows:
            longest = max(map(len, rows))
            batch[name] = torch.tensor([[*row, *(0,) * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(one.ids) for one in chunk], device=device)
    places = torch.arange(batch["input_ids"].shape[1], device=device)
    batch["attention_mask"] = (places < lengths.unsqueeze(1)).long()
    return batch
