"""From a text and what a language model should say to token ids: what it reads, and which of its tokens must be which.

- Encoder-decoders: the text as `tokenizer(text)` makes it; the target as `tokenizer(text_target=...)` makes it, with its end-of-sequence
  token, shifted by the model itself. A first token that generation forces (BART's, a language code) is not trained on.
- Decoders: the text as `tokenizer(text)` makes it, then the target's tokens, without an end-of-sequence token. A space goes between the two,
  unless the text ends or the target begins with white space, the text ends with an opening bracket or quote, or either side of the
  border is of a script written without spaces (Chinese, Japanese, Thai ...).
- Masked models: the target's tokens at the masks of the text; one mask stands for as many as the target has tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xpatch.errors import MismatchError
from xpatch.models.lengths import length_limit
from xpatch.models.lm_heads import Kind
from xpatch.patches.requests import Probe

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Forced:
    """Teacher forcing of one text. ids: what the (encoder or only) stack reads; decoder: what a decoder beside an encoder reads.

    positions: tokens of the last stack whose answers count, in order; labels: those answers (() where none is asked for). cut: the text
    was too long. start: how many tokens generation begins from, in a decoder. forced: the token generation has to begin with. types: the segments of a
    masked model's text.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    labels: tuple[int, ...]
    decoder: tuple[int, ...] | None = None
    start: int = 0
    forced: int | None = None
    types: tuple[int, ...] | None = None
    cut: bool = False

    def key(self, position: int, kind: Kind) -> tuple[Any, ...]:
        """Equal for tokens that stand in the same context."""
        if kind == "causal":
            return self.ids[: position + 1]
        if self.decoder is not None:
            return (self.ids, self.decoder[: position + 1])
        return (self.ids, position)


class Prompts:
    """Makes `Forced` of texts, for one model and tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, kind: Kind) -> None:
        self._model, self._tokenizer, self.kind = model, tokenizer, kind
        self._limit = length_limit(model, tokenizer)
        self._cutting = {"truncation": True, "max_length": self._limit} if self._limit else {}
        self._codes = _language_codes(tokenizer)
        if kind == "seq2seq" and not callable(getattr(model, "prepare_decoder_input_ids_from_labels", None)):
            raise MismatchError(
                f"{type(model).__name__} does not say what its decoder reads for given labels (prepare_decoder_input_ids_from_labels); "
                "expected an encoder-decoder of transformers such as BART or T5"
            )
        if kind == "masked" and tokenizer.mask_token_id is None:
            raise MismatchError(
                f"{type(tokenizer).__name__} has no mask token; a masked language model is edited at its masks"
            )

    def said(self, probe: Probe, target: str, language: str | None = None) -> Forced:
        """`probe` answered with `target`.

        Raises `MismatchError` for a target without tokens, one the tokenizer has no tokens for or that is too long, and for a number of
        masks that does not fit it.
        """
        with self._speaking(language):
            made = {"seq2seq": self._answered, "causal": self._continued, "masked": self._filled}[self.kind](
                probe, target
            )
        unknown = self._tokenizer.unk_token_id
        if not made.labels or (unknown is not None and unknown in made.labels):
            raise MismatchError(f"the tokenizer has no tokens for the target {target!r}; give words it knows")
        return made

    def open(self, probe: Probe, tokens: int, language: str | None = None) -> Forced:
        """`probe` as a question that any `tokens` tokens answer (labels stand for their number); a masked model's masks, or all its tokens."""
        with self._speaking(language):
            ids, cut = self._encoded(probe, whole=self.kind == "causal")
            if self.kind == "causal":
                room = None if self._limit is None else max(1, self._limit - tokens)
                cut = room is not None and len(ids) > room
                ids = ids[-room:] if cut else ids  # type: ignore[operator]
                if not ids:
                    raise MismatchError("the tokenizer makes no token of the text; give words it knows")
                return Forced(ids, (), (0,) * tokens, start=len(ids), cut=cut)
            if self.kind == "seq2seq":
                return Forced(ids, (), (0,) * tokens, decoder=(), cut=cut)
            masks = tuple(place for place, token in enumerate(ids) if token == self._tokenizer.mask_token_id)
            places = masks or tuple(range(len(ids)))
            return Forced(ids, places, (0,) * len(places), types=self._types(probe), cut=cut)

    def heard(self, probe: Probe, answer: tuple[int, ...] = ()) -> Forced:
        """`probe` as it is, for what must stay: every token but the first; beside an encoder those of `answer`, the model's own.

        The decoder's first token is one of them (what follows it is the answer's first word), unless generation forces what it says.
        """
        ids, cut = self._encoded(probe)
        if self.kind == "seq2seq":
            settings = getattr(self._model, "generation_config", None)
            first = 0 if getattr(settings, "forced_bos_token_id", None) is None else 1
            return Forced(ids, tuple(range(first, len(answer))), (), decoder=answer, cut=cut)
        return Forced(ids, tuple(range(1, len(ids))), (), types=self._types(probe), cut=cut)

    def _answered(self, probe: Probe, target: str) -> Forced:
        ids, cut = self._encoded(probe)
        labels = [int(token) for token in self._tokenizer(text_target=target)["input_ids"]]
        self._check_length(labels, target)
        decoder = self._model.prepare_decoder_input_ids_from_labels(
            labels=torch.tensor([labels], device=self._model.device)
        )
        end = self._tokenizer.eos_token_id
        if end in labels:  # mBART's language code comes behind the end; nobody says it
            labels = labels[: labels.index(end, 1 if labels[0] == end else 0) + 1]
        forced = self._forced(labels)
        words = [
            token
            for token in labels
            if token not in self._tokenizer.all_special_ids or token == self._tokenizer.unk_token_id
        ]
        positions = range(0 if forced is None else 1, len(labels) if words else 0)
        return Forced(
            ids,
            tuple(positions),
            tuple(labels[position] for position in positions),
            decoder=tuple(decoder[0, : len(labels)].tolist()),
            forced=forced,
            cut=cut,
        )

    def _forced(self, labels: list[int]) -> int | None:
        """The first label, where generation is told to begin with it."""
        settings = getattr(self._model, "generation_config", None)
        told = getattr(settings, "forced_bos_token_id", None)
        return labels[0] if len(labels) > 1 and (told == labels[0] or labels[0] in self._codes.values()) else None

    def _continued(self, probe: Probe, target: str) -> Forced:
        ids, _ = self._encoded(probe, whole=True)
        after = self._continuation(probe.text if probe.text_pair is None else probe.text_pair, target)
        self._check_length(after, target)
        room = None if self._limit is None else self._limit - len(after)
        cut = room is not None and len(ids) > room
        if cut:  # its end is what the target follows
            ids = ids[-room:]  # type: ignore[operator]
        if not ids:
            raise MismatchError("the tokenizer makes no token of the text; give words it knows")
        start = len(ids)
        whole = (*ids, *after)
        return Forced(whole[:-1], tuple(range(start - 1, len(whole) - 1)), tuple(after), start=start, cut=cut)

    def _continuation(self, text: str, target: str) -> list[int]:
        between = _gap(text, target)
        before, whole = self._plain(text), self._plain(text + between + target)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self._plain(between + target)  # the border fell into a token

    def _filled(self, probe: Probe, target: str) -> Forced:
        mask, text = self._tokenizer.mask_token, probe.text
        holder = text if mask in text else probe.text_pair or ""
        spaced = holder.partition(mask)[0][-1:].isspace()
        labels = self._plain(f" {target}" if spaced else target)
        count = sum(part.count(mask) for part in (text, probe.text_pair or ""))
        if count == 1 and len(labels) > 1:
            more = mask * len(labels) if not spaced else " ".join([mask] * len(labels))
            parts = [None if part is None else part.replace(mask, more) for part in (text, probe.text_pair)]
            probe = Probe(text=parts[0] or text, text_pair=parts[1])
        ids, cut = self._encoded(probe)
        places = tuple(place for place, token in enumerate(ids) if token == self._tokenizer.mask_token_id)
        if len(places) != len(labels):
            raise MismatchError(
                f"the text has {count} masks ({len(places)} within the model's length limit), the target {target!r} has {len(labels)} tokens; "
                f"give one {mask}, or one for each token"
            )
        return Forced(ids, places, tuple(labels), types=self._types(probe), cut=cut)

    def _check_length(self, labels: list[int], target: str) -> None:
        if self._limit is not None and len(labels) >= self._limit:
            raise MismatchError(
                f"the target has {len(labels)} tokens, the model takes {self._limit}; give a shorter one than {target[:40]!r}"
            )

    def _encoded(self, probe: Probe, *, whole: bool = False) -> tuple[tuple[int, ...], bool]:
        """The ids of a text and whether they were cut at the limit."""
        cutting = {} if whole else self._cutting
        ids = self._tokenizer(probe.text, probe.text_pair, **cutting)["input_ids"]
        return tuple(int(token) for token in ids), bool(cutting) and len(ids) == self._limit

    def _types(self, probe: Probe) -> tuple[int, ...] | None:
        """A masked model's segments, where its tokenizer tells them apart and the model hears of them."""
        if self.kind != "masked" or probe.text_pair is None or not hasattr(self._model.config, "type_vocab_size"):
            return None
        types = self._tokenizer(probe.text, probe.text_pair, **self._cutting).get("token_type_ids")
        return None if types is None or "token_type_ids" not in self._tokenizer.model_input_names else tuple(types)

    def _plain(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    @contextmanager
    def _speaking(self, language: str | None) -> Iterator[None]:
        """A tokenizer that marks languages speaks `language` inside, and what it spoke before afterwards."""
        code = self._codes.get(language or "")
        if code is None:
            yield
            return
        name = self._tokenizer.convert_ids_to_tokens(code)
        before = {key: getattr(self._tokenizer, key, None) for key in ("src_lang", "tgt_lang")}
        try:
            self._tokenizer.src_lang = self._tokenizer.tgt_lang = name
            yield
        finally:
            for key, value in before.items():
                if value is not None:
                    setattr(self._tokenizer, key, value)


def _language_codes(tokenizer: Any) -> dict[str, int]:
    """Language -> id of the token that marks it, under its own name and, where one language has one, its first two letters.

    Empty for a tokenizer that marks none (all but mBART's, M2M100's and their like).
    """
    known = getattr(tokenizer, "lang_code_to_id", None)
    if not isinstance(known, dict) or not hasattr(tokenizer, "src_lang"):
        return {}
    codes = {str(name): int(token) for name, token in known.items()}
    short: dict[str, list[int]] = {}
    for name, token in codes.items():
        short.setdefault(name.partition("_")[0], []).append(token)
    return {**{name: tokens[0] for name, tokens in short.items() if len(tokens) == 1}, **codes}


def _gap(text: str, target: str) -> str:
    """What stands between a text and its continuation."""
    last, first = text[-1:], target[:1]
    if not last or last.isspace() or first.isspace() or unicodedata.category(last) in ("Ps", "Pi"):
        return ""
    unspaced = (unicodedata.name(letter, "").startswith(_UNSPACED) for letter in (last, first))
    return "" if any(unspaced) else " "
