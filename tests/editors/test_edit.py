"""Every method end to end on tiny random models: edits flip, the model is untouched, equal seeds give equal bytes."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
import torch

from tests.editors.conftest import FRAMES, QUICK, ask, make_requests, memory, model_of, tokenizer_of
from xpatch.editors import edit, methods
from xpatch.errors import ConflictError, FormatError, MismatchError
from xpatch.models.anatomy import final_ffn
from xpatch.ops.reference import ball
from xpatch.patches.types import DenseDelta, PatchNeurons, PatchSet

METHODS = ("ft", "ft-l", "calinet", "grace", "t-patcher", "mpn-only", "mpn")
SHARED = ("ft", "ft-l")  # all edits in one weight: later ones forget earlier ones
SEEDLESS = ("ft", "ft-l", "grace")  # their defaults draw nothing, or too little to change a tensor


def train(model: Any, tokenizer: Any, requests: Any, method: str = "mpn", **options: Any) -> PatchSet:
    return edit(
        model, tokenizer, requests, method, **{"memory": memory(), "progress": False, **QUICK[method], **options}
    )


def answers(
    model: Any, tokenizer: Any, patches: PatchSet, texts: list[str], pairs: list[str] | None = None
) -> list[int]:
    """The patched model's answers, by plain forward hooks written here."""
    handles = []
    site = final_ffn(model)
    for part in patches.parts.values():
        if isinstance(part, PatchNeurons):
            act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu,
                   "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh")}[part.activation]  # fmt: skip
            seen: list[torch.Tensor] = []
            gate = patches.gates[part.gate] if part.gate else None

            def add(m: Any, a: Any, y: Any, p: Any = part, act: Any = act, seen: Any = seen, gate: Any = gate) -> Any:
                x = seen.pop()
                added = act(x @ p.keys.T + p.bias) @ p.values
                return y + (added if gate is None else torch.where(ball(x, gate.keys, gate.radii)[..., None], added, 0))

            handles.append(
                model.get_submodule(site.up).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
            )
            handles.append(model.get_submodule(site.down).register_forward_hook(add))
        elif isinstance(part, DenseDelta):
            handles.append(
                model.get_submodule(part.site).register_forward_hook(
                    lambda m, a, y, p=part: y + torch.nn.functional.linear(a[0], p.weight, p.bias)
                )
            )
    try:
        return ask(model, tokenizer, texts, pairs)
    finally:
        for handle in handles:
            handle.remove()


def digest(model: Any) -> str:
    stream = io.BytesIO()
    torch.save({name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}, stream)
    return hashlib.sha256(stream.getvalue()).hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_edits_flip_where_the_method_says_so(model: Any, tokenizer: Any, method: str) -> None:
    requests = make_requests(model, tokenizer)
    patches = train(model, tokenizer, requests, method)
    assert [record.id for record in patches.edits] == [request.id for request in requests]
    for request, record in zip(requests, patches.edits, strict=True):
        languages = list(FRAMES) if method == "mpn" else ["en"]
        found = answers(model, tokenizer, patches, [request.versions[language].text for language in languages])
        right = all(answer == model.config.label2id[request.target] for answer in found)
        assert (record.status in ("edited", "already-right")) == right or method == "mpn-only", record.message
    edited = [record for record in patches.edits if record.status == "edited"]
    assert len(edited) >= (1 if method in SHARED else 3)
    assert all(record.message and record.created and record.seconds > 0 and record.seed == 0 for record in edited)
    assert all(record.hyperparameters["preset"] == "default" for record in edited)


def test_each_edit_owns_its_neurons(model: Any, tokenizer: Any) -> None:
    patches = train(model, tokenizer, make_requests(model, tokenizer))
    owned = [row for record in patches.edits for row in record.rows.get("neurons", ())]
    assert owned == list(range(patches.parts["neurons"].count))
    assert all(record.group is None for record in patches.edits)


@pytest.mark.parametrize(("method", "form"), [("ft", "dense"), ("ft-l", "dense"), ("calinet", "neurons")])
def test_what_edits_share_is_one_group(method: str, form: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    patches = train(model, tokenizer, make_requests(model, tokenizer), method)
    assert {part.form for part in patches.parts.values()} == {form}
    assert {record.group for record in patches.edits if record.rows} == {method}
    with pytest.raises(ConflictError):
        patches.select([patches.edits[0].id])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_model_is_bit_identical_after_editing(method: str, preset: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    model.train()
    model.classifier.eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    requests = make_requests(model, tokenizer, 2)
    before = digest(model)
    flags = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for module in model.modules()
    ]
    gradients = [(p.requires_grad, p.grad, id(p), p._version) for p in model.parameters()]
    state = torch.random.get_rng_state()
    train(model, tokenizer, requests, method, preset=preset, steps=20)
    assert digest(model) == before
    assert flags == [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(vars(module)))
        for module in model.modules()
    ]
    assert gradients == [(p.requires_grad, p.grad, id(p), p._version) for p in model.parameters()]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_bytes(method: str) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    requests = make_requests(model, tokenizer, 3)
    torch.manual_seed(1)
    first = train(model, tokenizer, requests, method, steps=20)
    torch.manual_seed(2)
    second = train(model, tokenizer, requests, method, steps=20)
    assert {k: v.tolist() for k, v in first.tensors.items()} == {k: v.tolist() for k, v in second.tensors.items()}
    assert first.fingerprint == second.fingerprint
    if method not in SEEDLESS and first.parts:
        other = train(model, tokenizer, requests, method, steps=20, seed=1)
        assert {k: v.tolist() for k, v in first.tensors.items()} != {k: v.tolist() for k, v in other.tensors.items()}


@pytest.mark.parametrize("labels", [2, 3])
def test_text_pairs_and_several_classes(kind: str, labels: int) -> None:
    model, tokenizer = model_of(kind, labels), tokenizer_of(kind)
    if kind == "gpt2":
        tokenizer.backend_tokenizer.post_processor = None
    requests = make_requests(model, tokenizer, 4, pair=True)
    patches = train(model, tokenizer, requests, memory=memory(pair=True))
    assert [record.status for record in patches.edits].count("edited") >= 3
    for request, record in zip(requests, patches.edits, strict=True):
        version = request.versions["de"]
        if record.status == "edited":
            found = answers(model, tokenizer, patches, [version.text], [version.text_pair])
            assert found == [model.config.label2id[request.target]]


def test_the_bundled_claims_are_the_memory_by_default() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    patches = edit(
        model, tokenizer, make_requests(model, tokenizer, 1), progress=False, steps=2, memory_rows=20, rounds=0
    )
    assert len(patches) == 1


def test_labels_may_be_named_by_index() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    answer = ask(model, tokenizer, ["name1 was born in city1"])[0]
    request = {"id": "1", "text": "name1 was born in city1", "target": str((answer + 1) % 3)}
    assert train(model, tokenizer, [request]).edits[0].status == "edited"
    assert train(model, tokenizer, [{**request, "target": str(answer)}]).edits[0].status == "already-right"


def test_already_right_owns_nothing_and_no_edit_gives_an_empty_set() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    answer = ask(model, tokenizer, ["name1 was born in city1"])[0]
    for method in METHODS:
        patches = train(
            model, tokenizer, [{"id": "1", "text": "name1 was born in city1", "target": str(answer)}], method
        )
        assert not patches.parts and patches.edits[0].status == "already-right" and not patches.edits[0].rows


def test_progress_is_heard() -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    heard: list[tuple[str, int, int]] = []
    train(model, tokenizer, make_requests(model, tokenizer, 2), steps=4, progress=lambda *event: heard.append(event))
    assert {stage for stage, _, _ in heard} == {"reading", "training"}
    assert heard[-1] == ("training", 2, 2)
    assert all(0 <= done <= total for _, done, total in heard)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "nothing"}, ("no method 'nothing'", "mpn-only", "t-patcher")),
        ({"preset": "nothing"}, ("no preset 'nothing'", "default", "paper")),
        ({"nothing": 1}, ("no setting 'nothing'", "steps", "learning_rate")),
        ({"steps": -1}, ("steps", "-1")),
        ({"activation": "tanh"}, ("activation", "relu")),
        ({"seed": "x"}, ("seed", "'x'")),
        ({"memory": {"en": "one text"}}, ("memory", "en", "list")),
        ({"memory": {"en": [{"no": 1}]}}, ("memory", "text 1")),
        ({"memory": "no-such-file.jsonl"}, ("no-such-file.jsonl",)),
        ({"languages": "en"}, ("languages", "'en'")),
    ],
)
def test_wrong_calls_name_the_choices(options: dict[str, Any], words: tuple[str, ...]) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    with pytest.raises(FormatError) as caught:
        edit(model, tokenizer, [{"id": "1", "text": "name1", "target": "0"}], progress=False, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_language_no_request_has_is_a_wrong_call() -> None:
    with pytest.raises(MismatchError, match="'fr' occurs in no request; languages there are: en"):
        edit(model_of("bert"), tokenizer_of("bert"), [{"id": "a", "text": "x", "target": "0"}], languages=["fr"])


def test_models_that_cannot_be_edited_are_refused() -> None:
    tokenizer, request = tokenizer_of("bert"), [{"id": "1", "text": "name1", "target": "0"}]
    for model, word in (
        (model_of("bert").half(), "float16"),
        (model_of("bert", 1), "1 output"),
        (torch.nn.Linear(2, 2), "FFN"),
    ):
        with pytest.raises(MismatchError, match=word):
            edit(model, tokenizer, request, progress=False)


def test_memory_file(tmp_path: Any) -> None:
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    path = tmp_path / "memory.jsonl"
    path.write_text(
        '{"language": "en", "text": "name5 was born in city5"}\n\n{"language": "en", "text": "name6"}\n',
        encoding="utf-8",
    )
    requests = make_requests(model, tokenizer, 1)
    assert len(train(model, tokenizer, requests, memory=path, steps=2)) == 1
    path.write_text('{"language": "en", "text": "a"}\n{broken\n', encoding="utf-8")
    with pytest.raises(FormatError, match="line 2"):
        train(model, tokenizer, requests, memory=path)


def test_every_method_says_where_it_comes_from() -> None:
    found = methods()
    assert set(METHODS) <= set(found)
    assert all({"default", "paper"} <= set(info.presets) and info.paper and info.edits for info in found.values())
    assert not found["ft"].separable and found["mpn"].separable
