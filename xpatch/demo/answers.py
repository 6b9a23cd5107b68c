"""What the model says to claims in every language, as tables of labels with ✓ and ✗."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from xpatch.patches.requests import EditRequest, Probe

Answers = dict[str, dict[str, str]]  # request id -> language -> label


def ask(model: Any, tokenizer: Any, requests: Sequence[EditRequest]) -> Answers:
    """The label the model, as it stands, gives each version of each request."""
    from xpatch.evaluation import predict

    places = [(request.id, language) for request in requests for language in request.versions]
    probes: list[Probe | str] = [
        request.versions[language].probe for request in requests for language in request.versions
    ]
    found: Answers = {request.id: {} for request in requests}
    for (name, language), label in zip(places, predict(model, tokenizer, probes, batch_size=64), strict=True):
        found[name][language] = label
    return found


def wrong_languages(request: EditRequest, answers: Mapping[str, str]) -> list[str]:
    """The languages in which the answer is not the request's target."""
    return [language for language, label in answers.items() if label != request.target_of(language)]


def most_wrong(requests: Sequence[EditRequest], answers: Answers, count: int) -> list[EditRequest]:
    """The `count` requests that are wrong in most languages, first come first on ties; those right everywhere are left out."""
    wrong = [(len(wrong_languages(request, answers[request.id])), request) for request in requests]
    return [request for number, request in sorted(wrong, key=lambda item: -item[0]) if number][:count]


def verdict(request: EditRequest, language: str, label: str) -> Text:
    """ "✓ SUPPORTS" in green or "✗ REFUTES" in red."""
    right = label == request.target_of(language)
    return Text(f"{'✓' if right else '✗'} {label}", style="green" if right else "red")


def comparison(title: str, requests: Sequence[EditRequest], stages: Sequence[tuple[str, Answers]]) -> Table:
    """One block a claim: one line a language with its text, the gold label, and the answer at every stage."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False)
    table.add_column(Text("claim"), overflow="fold")
    table.add_column(Text("gold"))
    for name, _ in stages:
        table.add_column(Text(name))
    for number, request in enumerate(requests):
        if number:
            table.add_row()
        for language, version in request.versions.items():
            cells = [verdict(request, language, answers[request.id][language]) for _, answers in stages]
            table.add_row(Text(f"{language}  {version.text}"), Text(request.target_of(language) or ""), *cells)
    return table
