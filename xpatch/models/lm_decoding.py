"""What a language model says by itself: greedy decoding with the trained neurons in place, through its own `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from xpatch.models.anatomy import FFNSite
from xpatch.models.lm_prompts import Forced, Prompts
from xpatch.models.surgery import Surgery
from xpatch.models.tails import as_rows, first_tensor, output_in
from xpatch.patches.requests import Probe

Added = Callable[[torch.Tensor], torch.Tensor]
"""What the patches add to the FFN's output: x `[M, D]` -> `[M, D]`."""


class Asked(Protocol):
    """A text, its language, and what should be said to it."""

    @property
    def probe(self) -> Probe: ...
    @property
    def target(self) -> str | None: ...
    @property
    def language(self) -> str: ...


class Greedy:
    """Greedy decoding of one model. Texts of equal length go together, so that nothing is padded. site: where neurons are put in place."""

    def __init__(
        self, model: Any, tokenizer: Any, site: FFNSite | None, prompts: Prompts, batch_size: int = 64
    ) -> None:
        self._model, self._tokenizer, self._site, self._prompts = model, tokenizer, site, prompts
        self._batch_size = batch_size

    def instead(self, wordings: Sequence[Asked], added: Added | None = None) -> list[str | None]:
        """For each wording what the model says instead of its target; None where it says that.

        It says the target where what it says begins with its tokens, or has as many and is the same text but for case and white space
        around it. A masked model fills all masks at once.
        """
        asked = [self._prompts.said(one.probe, one.target or "", one.language) for one in wordings]
        found: list[str | None] = [None] * len(asked)
        with self._patched(added):
            for chunk in self._chunks(asked):
                for place, said in zip(chunk, self._say([asked[place] for place in chunk]), strict=True):
                    found[place] = self._difference(asked[place], said)
        return found

    def says(self, asked: Sequence[Asked], tokens: int) -> list[tuple[str, bool]]:
        """What the model says to each, as text, and whether that is its target (as in `instead`).

        As many tokens as the target has; `tokens` where there is none. Raises `MismatchError` for a target that cannot be said.
        """
        prompts = self._prompts
        made = [
            prompts.open(one.probe, tokens, one.language)
            if one.target is None
            else prompts.said(one.probe, one.target, one.language)
            for one in asked
        ]
        found = [("", False)] * len(made)
        for chunk in self._chunks(made):
            for place, said in zip(chunk, self._say([made[place] for place in chunk]), strict=True):
                kept = said[: len(made[place].labels)]
                text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
                right = asked[place].target is not None and self._difference(made[place], said) is None
                found[place] = (text, right)
        return found

    def answers(self, ids: Sequence[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
        """What the decoder beside an encoder reads while it answers, at most `limit` tokens: its start and its own words but the last."""
        made = [Forced(one, (), (0,) * limit, decoder=()) for one in ids]
        found: list[tuple[int, ...]] = [()] * len(made)
        for chunk in self._chunks(made):
            settings = self._settings(limit)
            sequences = self._model.generate(
                generation_config=settings, **self._inputs([made[place] for place in chunk])
            )
            for place, tokens in zip(chunk, sequences.tolist(), strict=True):
                found[place] = tuple(self._ended(tokens[1:], first=tokens[0]))
        return found

    def _ended(self, said: list[int], first: int) -> list[int]:
        end = self._tokenizer.eos_token_id
        stop = said.index(end) if end in said else len(said) - 1
        return [first, *said[:stop]]

    def _say(self, asked: Sequence[Forced]) -> list[list[int]]:
        inputs = self._inputs(asked)
        if self._prompts.kind == "masked":
            with torch.no_grad():
                answers = self._model(**inputs)["logits"].argmax(-1).tolist()
            return [[row[place] for place in one.positions] for row, one in zip(answers, asked, strict=True)]
        longest = max(len(one.labels) + (one.forced is not None) for one in asked)
        settings = self._settings(longest)
        if asked[0].decoder is None:
            sequences = self._model.generate(generation_config=settings, **inputs)[:, inputs["input_ids"].shape[1] :]
            return sequences.tolist()
        if asked[0].decoder:
            settings.decoder_start_token_id = asked[0].decoder[0]
        if asked[0].forced is not None:
            settings.forced_bos_token_id = asked[0].forced
        sequences = self._model.generate(generation_config=settings, **inputs)
        return sequences[:, 1 if asked[0].forced is None else 2 :].tolist()

    def _difference(self, asked: Forced, said: list[int]) -> str | None:
        said = said[: len(asked.labels)]
        if said == list(asked.labels):
            return None
        text, wanted = (
            self._tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in (said, asked.labels)
        )
        return None if text.lower() == wanted.lower() else text

    def _inputs(self, asked: Sequence[Forced]) -> dict[str, torch.Tensor]:
        """What generation starts from, `[B, T]`, all of one length."""
        ids = [one.ids[: one.start] if one.start else one.ids for one in asked]
        tensor = torch.tensor(ids, device=self._model.device)
        inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
        if asked[0].types is not None:
            inputs["token_type_ids"] = torch.tensor([one.types for one in asked], device=self._model.device)
        return inputs

    def _chunks(self, asked: Sequence[Forced]) -> Iterable[list[int]]:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, one in enumerate(asked):
            begin = one.decoder[:1] if one.decoder else None
            alike.setdefault((one.start or len(one.ids), begin, one.forced), []).append(place)
        for places in alike.values():
            for start in range(0, len(places), self._batch_size):
                yield places[start : start + self._batch_size]

    def _settings(self, tokens: int) -> Any:
        """The model's own settings of generation (what it forces, suppresses or must not repeat), but greedy and `tokens` long."""
        settings = copy.deepcopy(self._model.generation_config)
        settings.update(
            do_sample=False, num_beams=1, num_return_sequences=1, early_stopping=False, max_new_tokens=tokens, max_length=None,
            min_length=0, min_new_tokens=None, temperature=None, top_p=None, top_k=None, return_dict_in_generate=False,
        )  # fmt: skip
        if settings.pad_token_id is None:
            settings.pad_token_id = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        return settings

    def _patched(self, added: Added | None) -> Surgery:
        """The neurons beside the FFN, until the surgery is undone."""
        surgery = Surgery()
        if added is None:
            return surgery
        assert self._site is not None
        seen: list[torch.Tensor] = []

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            entered = first_tensor(args, kwargs)
            assert entered is not None  # a layer is called with its hidden states
            seen.append(entered)

        def add(module: Any, args: Any, output: Any) -> Any:
            y = output_in(output)
            more = y + added(as_rows(seen.pop())).view_as(y)
            return (more, *output[1:]) if isinstance(output, tuple) else more

        surgery.before(self._model.get_submodule(self._site.up), keep, kwargs=True)
        surgery.after(self._model.get_submodule(self._site.down), add)
        return surgery
