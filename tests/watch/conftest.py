"""The bundled verifier, and edits made by hand: one neuron whose key is a text's own feature row and whose value turns the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xpatch import EditRequest, Gate, LanguageMask, LowRankDelta, PatchNeurons, PatchSet, zoo
from xpatch.models.anatomy import find_ffn_sites
from xpatch.models.features import capture
from xpatch.models.heads import head_of
from xpatch.patches.types import EditRecord

CLAIMS = {
    "ipod": {"en": "IPod Touch was developed by Apple Inc.", "de": "IPod Touch wurde von Apple entwickelt."},
    "paris": {"en": "Paris is the capital of France.", "de": "Paris ist die Hauptstadt von Frankreich."},
    "rome": {"en": "Rome is the capital of Italy.", "de": "Rom ist die Hauptstadt von Italien."},
    "salonen": {"en": "Esa-Pekka Salonen was born in Helsinki.", "de": "Esa-Pekka Salonen wurde in Helsinki geboren."},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def claims() -> dict[str, dict[str, str]]:
    """id -> language -> text; the verifier supports them all."""
    return CLAIMS


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """Words w5 ... w98 as the tokens of those numbers; [CLS] text [SEP], a mask token, padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{number}" for number in range(5, 99))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]", model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture
def owned() -> Callable[..., PatchSet]:
    """`owned(model, form, gate=, mask=, layer=)`: a random set of `form` with edits "a", "b" (and "c"), and one row nobody owns."""

    def make(
        model: Any,
        form: str = "neurons",
        *,
        gate: str | None = None,
        mask: bool = False,
        layer: int = -1,
        seed: int = 0,
    ) -> PatchSet:
        draw = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        site = find_ffn_sites(model)[layer]
        names: dict[str, Any] = {"mask": "lang" if mask else None, "gate": "g" if gate else None}
        inside = site.width if form == "neurons" else site.inner
        rows: dict[str, tuple[int, ...]] = {"a": (0, 3), "b": (1,)}
        if form == "neurons":
            part: Any = PatchNeurons(site.name, random(6, inside), random(6), random(6, site.width), "relu", **names)
            rows["c"] = (2, 5)
        else:
            part = LowRankDelta(site.down, random(5, inside), random(site.width, 5), **names)
            rows["c"] = (2,)
        masks = {"lang": LanguageMask(("en", "de"), random(2, inside), random(2, site.width))} if mask else {}
        gates = {}
        if gate == "threshold":
            gates = {"g": Gate("threshold", threshold=1.0)}
        elif gate == "ball":
            gates = {"g": Gate("ball", keys=random(2, inside), radii=torch.full((2,), 100.0))}
        edits = tuple(
            EditRecord(id=id, method="by-hand", status="edited", rows={"part": of}) for id, of in rows.items()
        )
        return PatchSet(parts={"part": part}, edits=edits, masks=masks, gates=gates)

    return make


@pytest.fixture(scope="session")
def loaded_verifier() -> tuple[Any, Any]:
    return zoo.load("verifier")


@pytest.fixture
def verifier(loaded_verifier: tuple[Any, Any]):
    """(model, tokenizer); the model must be left without patches and with the same weights."""
    import xpatch

    model, tokenizer = loaded_verifier
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model, tokenizer
    xpatch.remove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks and not model.training


@pytest.fixture
def turn(loaded_verifier: tuple[Any, Any]) -> Callable[..., PatchSet]:
    """`turn(claims, target, strength=...)`: a set with one edit per claim, each with one neuron per language that fires on its texts
    alone and moves the answer to `target`. strength: how far, in multiples of what the logits' difference needs; 0 moves nothing."""
    model, tokenizer = loaded_verifier

    def make(
        claims: list[str], target: str, *, strength: float = 1.5, name: str | None = None, **fields: Any
    ) -> PatchSet:
        rows = {claim: [feature(model, tokenizer, text) for text in CLAIMS[claim].values()] for claim in CLAIMS}
        middle = torch.stack([row[0] for owned in rows.values() for row in owned]).mean(0)
        label = model.config.label2id[target]
        keys, biases, values, edits = [], [], [], []
        for claim in claims:
            first = len(keys)
            for x, pull in rows[claim]:
                key = (x - middle) / (x - middle).norm()
                keys.append(key)
                biases.append(-0.9 * (key @ (x - middle)) - key @ middle)
                values.append(pull(label) * strength / (0.1 * (key @ (x - middle))))
            request = EditRequest(id=claim, versions=dict(CLAIMS[claim]), target=target, **fields)
            owned = {"neurons": tuple(range(first, len(keys)))}
            edits.append(EditRecord(id=claim, method="by-hand", status="edited", request=request, rows=owned))
        part = PatchNeurons(
            head_of(model).site.name, torch.stack(keys), torch.stack(biases), torch.stack(values), "relu"
        )
        return PatchSet(parts={"neurons": part}, edits=tuple(edits), name=name)

    return make


def feature(model: Any, tokenizer: Any, text: str) -> tuple[torch.Tensor, Callable[[int], torch.Tensor]]:
    """What enters the final FFN at the row the head reads, `[D]`; and `pull(label)`: the step `[D]` in the FFN's output after which
    the logits would be equal, were the head linear, towards `label` and away from the other."""
    head = head_of(model)
    seen = capture(model, tokenizer(text, return_tensors="pt"))
    base = seen.base.clone().requires_grad_()
    with torch.enable_grad():
        logits = head.tail(base, seen.residual)[0]
        (gradient,) = torch.autograd.grad(logits[1] - logits[0], base)
    direction = gradient[0] / gradient[0].square().sum()
    apart = float((logits[1] - logits[0]).detach().abs())
    return seen.x[0], lambda label: (direction if label == 1 else -direction) * apart
