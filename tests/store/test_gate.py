"""The acceptance gate on the bundled verifier: what moves is refused, nothing is written, the model is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch import ConflictError, FormatError, LanguageMask, MismatchError, PatchNeurons, PatchSet, PatchStore
from xpatch.evaluation.predict import predict
from xpatch.models.anatomy import final_ffn
from xpatch.patches.requests import Probe

pytest.importorskip("transformers")

KEEP = [
    {"text": "Paris is the capital of France.", "language": "en"},
    {"text": "Berlin ist die Hauptstadt von Deutschland.", "language": "de"},
    {"text": "The sun is a planet.", "language": "en"},
    {"text": "Madrid es la capital de España.", "language": "es"},
    {"text": "Rom ist die Hauptstadt von Frankreich.", "language": "de"},
    {"text": "Lima is in Europe.", "text_pair": "It is in Peru."},
    {"text": "Tokyo is the capital of Japan.", "language": "en"},
    {"text": "Oslo is the capital of Norway.", "language": "en"},
]


@pytest.fixture(scope="module")
def verifier() -> tuple[Any, Any]:
    import xpatch.zoo

    return xpatch.zoo.load("verifier")


PROBES = [Probe(text=row["text"], text_pair=row.get("text_pair")) for row in KEEP]


@pytest.fixture(scope="module")
def answers(verifier: tuple[Any, Any]) -> list[str]:
    return predict(*verifier, PROBES)


def constant(model: Any, value: torch.Tensor) -> PatchSet:
    """A set that adds `value` `[D]` to the final FFN's output in every row."""
    site = final_ffn(model)
    return PatchSet({"n": PatchNeurons(site.name, torch.zeros(1, site.width), torch.ones(1), value[None], "relu")})


def in_german(model: Any, patches: PatchSet) -> PatchSet:
    """The same, for German rows only."""
    width = final_ffn(model).width
    mask = LanguageMask(("en", "de"), torch.ones(2, width), torch.stack([torch.zeros(width), torch.ones(width)]))
    return PatchSet({"n": replace(patches.parts["n"], mask="m")}, masks={"m": mask})


@pytest.fixture(scope="module")
def harmless(verifier: tuple[Any, Any]) -> PatchSet:
    return constant(verifier[0], torch.zeros(final_ffn(verifier[0]).width))


@pytest.fixture(scope="module")
def harmful(verifier: tuple[Any, Any], answers: list[str]) -> tuple[PatchSet, str]:
    """A set that gives every text the rarer label of `answers`, and that label: it drowns every row in that of one such text."""
    model, tokenizer = verifier
    label = min(set(answers), key=answers.count)
    seen: list[torch.Tensor] = []
    norm = model.bert.encoder.layer[-1].output.LayerNorm
    with norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 0])), torch.no_grad():
        model(**tokenizer(KEEP[answers.index(label)]["text"], return_tensors="pt"))
    patches = constant(model, 1e3 * seen[0])
    xpatch.apply(model, patches, name="x")
    labels = set(predict(model, tokenizer, PROBES))
    xpatch.remove(model, "x")
    assert labels == {label}
    return patches, label


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def untouched(store: PatchStore, tmp_path: Path) -> None:
    assert not (tmp_path / "store").exists(), "a refused publish writes nothing"


def test_a_harmless_set_passes_and_the_move_says_what_was_asked(
    local: PatchStore, verifier: tuple[Any, Any], harmless: PatchSet, answers: list[str], tmp_path: Path
) -> None:
    model, tokenizer = verifier
    keep = jsonl(tmp_path / "keep.jsonl", *KEEP)
    hold = [{"text": KEEP[0]["text"], "target": answers[0]}, {"id": "1", "text": KEEP[1]["text"], "target": answers[1]}]
    seen: list[tuple[str, int, int]] = []
    move = local.publish(
        harmless, model=model, tokenizer=tokenizer, must_not_change=keep, must_hold=jsonl(tmp_path / "hold.jsonl", *hold),
        progress=lambda *values: seen.append(values),
    )  # fmt: skip
    assert dict(move.checked) == {"must_not_change": 8, "must_hold": 2} and local.current() == move
    assert "[checked: must not change 8, must hold 2]" in str(local.history())
    assert seen[-1] == ("checking", 10, 10)


def test_moved_predictions_are_listed_and_nothing_is_written(
    local: PatchStore, verifier: tuple[Any, Any], harmful: tuple[PatchSet, str], answers: list[str], tmp_path: Path
) -> None:
    model, tokenizer = verifier
    patches, label = harmful
    moved = [row for row, answer in zip(KEEP, answers, strict=True) if answer != label]
    rows = [*KEEP, *moved]
    assert len(moved) > 2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConflictError) as refused:
        local.publish(patches, model=model, tokenizer=tokenizer, must_not_change=rows)
    text = str(refused.value)
    assert f"{2 * len(moved)} of {len(rows)} predictions that must not change did:" in text
    listed = [line for line in text.splitlines() if line.startswith("  [")]
    assert len(listed) == 5 and f"  and {2 * len(moved) - 5} more" in text
    other = next(answer for answer in answers if answer != label)
    assert f"[{moved[0].get('language', 'no language')}] {moved[0]['text']!r}: {other} -> {label}" in text
    assert patches.fingerprint[:12] in text and "nothing was written" in text and "--memory" in text
    untouched(local, tmp_path)
    assert xpatch.status(model).names == () and not model._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_targets_that_do_not_hold(
    local: PatchStore, verifier: tuple[Any, Any], harmful: tuple[PatchSet, str], tmp_path: Path
) -> None:
    """Probes, and every version and rephrase of edit requests; labels by name or index."""
    model, tokenizer = verifier
    patches, label = harmful
    names = [model.config.id2label[index] for index in range(2)]
    wrong = names[1 - names.index(label)]
    request = {
        "id": "r",
        "text": "One.",
        "target": wrong,
        "parallel": {"de": "Eins."},
        "rephrases": ["Uno.", {"text": "Un.", "target": label}],
    }
    rows = [
        {"text": "Two.", "target": label},
        {"text": "Three.", "target": str(names.index(wrong)), "language": "en"},
        request,
    ]
    with pytest.raises(ConflictError) as refused:
        local.publish(patches, model=model, tokenizer=tokenizer, must_hold=jsonl(tmp_path / "hold.jsonl", *rows))
    text = str(refused.value)
    assert "4 of 6 predictions that must hold do not:" in text
    for part in ("'Three.'", "'One.'", "[de] 'Eins.'", "'Uno.'"):
        assert part in text
    assert "'Two.'" not in text and "'Un.'" not in text and f"-> {label}, expected {wrong}" in text
    untouched(local, tmp_path)


def test_only_the_set_is_asked_and_other_sets_stay(
    local: PatchStore, verifier: tuple[Any, Any], harmful: tuple[PatchSet, str], harmless: PatchSet, answers: list[str]
) -> None:
    model, tokenizer = verifier
    xpatch.apply(model, harmful[0], name="served")
    try:
        served = predict(model, tokenizer, PROBES)
        model.train()
        hold = [probe.model_copy(update={"target": answer}) for probe, answer in zip(PROBES, answers, strict=True)]
        local.publish(harmless, model=model, tokenizer=tokenizer, must_not_change=KEEP, must_hold=hold)
        assert model.training and model.bert.encoder.layer[0].training
        assert predict(model, tokenizer, PROBES) == served and xpatch.status(model).names == ("served",)
        with pytest.raises(ConflictError):
            local.publish(harmful[0], model=model, tokenizer=tokenizer, must_not_change=KEEP)
        assert xpatch.status(model).names == ("served",)
    finally:
        model.eval()
        xpatch.remove(model)


def test_a_masked_set_is_asked_in_each_texts_language(
    local: PatchStore, verifier: tuple[Any, Any], harmful: tuple[PatchSet, str], answers: list[str]
) -> None:
    model, tokenizer = verifier
    german = in_german(model, harmful[0])
    other = [row for row, answer in zip(KEEP, answers, strict=True) if answer != harmful[1]]
    probes = [{"text": row["text"], "language": "en"} for row in other]
    assert local.publish(german, model=model, tokenizer=tokenizer, must_not_change=probes).number == 1
    with pytest.raises(ConflictError, match=rf"{len(other)} of {len(other)} predictions"):
        local.publish(
            german, "again", model=model, tokenizer=tokenizer, must_not_change=[{**p, "language": "de"} for p in probes]
        )


@pytest.mark.parametrize(
    ("texts", "error", "told"),
    [
        ({"must_hold": [{"text": "x"}]}, FormatError, "must_hold, text 1: expected a 'target' to hold"),
        ({"must_hold": [{"text": "x", "target": "MAYBE"}]}, MismatchError, "must_hold, text 1: label 'MAYBE'"),
        ({"must_hold": [{"id": "1", "text": ""}]}, FormatError, "must_hold, text 1: versions.en"),
        ({"must_not_change": [{"txt": "x"}]}, FormatError, "must_not_change, text 1"),
        ({"must_not_change": [{"text": "x", "language": 3}]}, FormatError, "must_not_change, text 1: language"),
        ({"must_not_change": []}, FormatError, "expected at least one text, found none"),
        ({"must_not_change": "nowhere.jsonl"}, FormatError, "must_not_change file nowhere.jsonl does not exist"),
        ({"must_not_change": ["x"], "tokenizer": None}, MismatchError, "expected model= and tokenizer= to ask"),
        ({"must_not_change": ["x"], "model": None}, MismatchError, "expected model= and tokenizer= to ask"),
    ],
)
def test_bad_texts(
    local: PatchStore, verifier: tuple[Any, Any], harmless: PatchSet, tmp_path: Path, texts: Any, error: Any, told: str
) -> None:
    with pytest.raises(error, match=told):
        local.publish(harmless, **{"model": verifier[0], "tokenizer": verifier[1], **texts})
    untouched(local, tmp_path)


def test_a_bad_line_is_named(local: PatchStore, verifier: tuple[Any, Any], harmless: PatchSet, tmp_path: Path) -> None:
    keep = tmp_path / "keep.jsonl"
    keep.write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(FormatError, match=r"must_not_change file .*keep.jsonl, line 3: not valid JSON"):
        local.publish(harmless, model=verifier[0], tokenizer=verifier[1], must_not_change=keep)


def test_a_model_alone_checks_the_fit(
    local: PatchStore, verifier: tuple[Any, Any], harmless: PatchSet, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError):
        local.publish(harmless, model=tiny("gpt2"))
    untouched(local, tmp_path)
    assert dict(local.publish(harmless, model=verifier[0]).checked) == {}


def test_an_interrupted_check_leaves_the_model_as_it_was(
    local: PatchStore, verifier: tuple[Any, Any], harmless: PatchSet, tmp_path: Path
) -> None:
    def stop(*values: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.publish(harmless, model=verifier[0], tokenizer=verifier[1], must_not_change=KEEP, progress=stop)
    assert xpatch.status(verifier[0]).names == ()
    untouched(local, tmp_path)
