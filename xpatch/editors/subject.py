"""What is edited: a classifier, or one of the three kinds of language models. How its requests are read, and what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xpatch.editors.cache import FeatureCache
from xpatch.editors.inputs import labels_of, resolve_edit, taking_part
from xpatch.editors.task import Decoding, Edit, Wording
from xpatch.editors.token_cache import TokenCache, model_inputs
from xpatch.errors import MismatchError
from xpatch.models.anatomy import FFNSite, final_ffn
from xpatch.models.heads import Head, head_of
from xpatch.models.lm_decoding import Greedy
from xpatch.models.lm_heads import LMHead, lm_head_of, lm_kind
from xpatch.models.lm_prompts import Prompts
from xpatch.patches.requests import EditRequest, Probe

SubjectKind = Literal["classifier", "causal", "seq2seq", "masked"]


@dataclass(frozen=True)
class Bench:
    """What an editor works at; see `task.Task`."""

    head: Head | LMHead
    cache: FeatureCache
    decoding: Decoding | None


class Classifier:
    """A sequence classifier: targets are its labels."""

    kind: SubjectKind = "classifier"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer, self._head = model, tokenizer, head_of(model)
        self._labels = labels_of(model, self._head.labels)

    @property
    def site(self) -> FFNSite:
        return self._head.site

    def resolve(self, request: EditRequest, languages: Sequence[str] | None) -> Edit:
        """See `inputs.resolve_edit`."""
        return resolve_edit(request, self._labels, languages)

    def index(self, target: str) -> int | None:
        return self._labels.get(target)

    def bench(self, edits: Sequence[Edit]) -> Bench:
        return Bench(self._head, FeatureCache(self._model, self._tokenizer, self.site), None)


class LanguageModel:
    """A language model: targets are what it should say."""

    def __init__(self, model: Any, tokenizer: Any, kind: SubjectKind) -> None:
        assert kind != "classifier"
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            raise MismatchError(
                f"{type(model).__name__} reads {model.main_input_name}; expected a model that reads text (input_ids)"
            )
        self.kind: SubjectKind = kind
        self._model, self._tokenizer, self.site = model, tokenizer, final_ffn(model)
        self._prompts = Prompts(model, tokenizer, kind)

    def resolve(self, request: EditRequest, languages: Sequence[str] | None) -> Edit:
        """A request with what is to be said to each text.

        Raises `MismatchError` for a target that is missing, has no tokens or does not fit the text (see `Prompts.said`), and for
        an own-language text without words.
        """
        versions: list[Wording] = []
        rephrases: list[Wording] = []
        negatives: list[Probe] = []
        for language in taking_part(request, languages):
            version = request.versions[language]
            target = request.target_of(language)
            versions.append(self._wording(request, version.probe, target, language))
            for probe in version.rephrases:
                own = target if probe.target is None else probe.target
                rephrases.append(self._wording(request, probe, own, language))
            negatives += version.locality
        return Edit(request, tuple(versions), tuple(rephrases), tuple(negatives))

    def _wording(self, request: EditRequest, probe: Probe, target: str | None, language: str) -> Wording:
        where = f"request {request.id!r}, language {language!r}"
        if target is None or not target.strip():
            raise MismatchError(f"{where}: no target; give the text that {type(self._model).__name__} should say")
        try:
            self._prompts.said(probe, target, language)
        except MismatchError as error:
            raise MismatchError(f"{where}: {error}") from None
        return Wording(probe, -1, language, target)

    def index(self, target: str) -> int | None:
        return None

    def bench(self, edits: Sequence[Edit]) -> Bench:
        """Finds the head on the first edit's text, as it will be taught."""
        first = edits[0].versions[0]
        inputs = model_inputs([self._prompts.said(first.probe, first.target or "", first.language)], self._model.device)
        if (
            inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] < 2
        ):  # one token cannot be told from one sequence
            inputs = {name: value.repeat(1, 2) for name, value in inputs.items()}
        head = lm_head_of(self._model, inputs, self._prompts.kind)
        greedy = Greedy(self._model, self._tokenizer, head.site, self._prompts)
        return Bench(head, TokenCache(self._model, self._tokenizer, head, self._prompts, greedy), greedy)


def subject_of(model: Any, tokenizer: Any) -> Classifier | LanguageModel:
    """The subject that `model` is. Raises `MismatchError` for a model that is neither a classifier with a known head nor a language model."""
    kind = lm_kind(model)
    return Classifier(model, tokenizer) if kind is None else LanguageModel(model, tokenizer, kind)
