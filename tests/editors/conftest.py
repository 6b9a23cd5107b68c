"""Tiny random classifiers of the real classes, a word-level tokenizer, and requests about made-up people in three languages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xpatch
from xpatch.editors.cache import FeatureCache
from xpatch.editors.inputs import as_memory, labels_of, resolve_edits
from xpatch.editors.task import Task
from xpatch.models.heads import head_of
from xpatch.patches.requests import EditRequest

transformers = pytest.importorskip("transformers")

NAMES = [f"name{number}" for number in range(24)]
CITIES = [f"city{number}" for number in range(12)]
FRAMES = {"en": ("{} was born in {}", "the birthplace of {} is {}"), "de": ("{} wurde in {} geboren", "{} kam in {} zur Welt"),
          "xx": ("qa {} qo {}", "qo {} qi {} qu")}  # fmt: skip
LABELS = {"REFUTES": 0, "SUPPORTS": 1, "UNKNOWN": 2}


def sentence(language: str, frame: int, number: int) -> str:
    return FRAMES[language][frame].format(NAMES[number % len(NAMES)], CITIES[(number * 7) % len(CITIES)])


def tokenizer_of(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for pair in FRAMES.values() for frame in pair for word in frame.split() if word != "{}"})
    vocabulary = {
        word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words, *NAMES, *CITIES])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind not in ("gpt2", "llama"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=24,
    )


def model_of(kind: str, labels: int = 3) -> Any:
    """A random classifier whose rows differ enough from text to text to be told apart."""
    names = {name: index for name, index in LABELS.items() if index < labels}
    common = {
        "num_labels": labels,
        "label2id": names,
        "id2label": {i: n for n, i in names.items()},
        "pad_token_id": 0,
        "vocab_size": 80,
    }
    wide = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(max_position_embeddings=32, **wide, **common)
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "xlmr":
        config = transformers.XLMRobertaConfig(max_position_embeddings=32, type_vocab_size=1, **wide, **common)
        return transformers.XLMRobertaForSequenceClassification(config).eval()
    if kind == "llama":
        config = transformers.LlamaConfig(max_position_embeddings=32, **wide, **common)
        return transformers.LlamaForSequenceClassification(config).eval()
    config = transformers.GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **common)
    return transformers.GPT2ForSequenceClassification(config).eval()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads of tiny problems spend their time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["bert", "xlmr", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Any:
    return model_of(kind)


@pytest.fixture
def tokenizer(kind: str) -> Any:
    return tokenizer_of(kind)


def ask(model: Any, tokenizer: Any, texts: list[str], pairs: list[str] | None = None) -> list[int]:
    """The model's answers, one label index per text."""
    batch = tokenizer(texts, pairs, padding=True, return_tensors="pt")
    batch = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).logits.argmax(-1).tolist()


def make_requests(model: Any, tokenizer: Any, count: int = 4, pair: bool = False) -> list[EditRequest]:
    """Requests for an answer the model does not give to the English text."""
    made = []
    names = {index: name for name, index in model.config.label2id.items()}
    for number in range(count):
        texts = {language: sentence(language, 0, number) for language in FRAMES}
        other = {language: sentence(language, 1, number + 5) if pair else None for language in FRAMES}
        answer = ask(model, tokenizer, [texts["en"]], [other["en"]] if pair else None)[0]
        made.append(
            EditRequest.model_validate(
                {
                    "id": f"edit-{number}",
                    "target": names[(answer + 1) % model.config.num_labels],
                    "versions": {
                        language: {"text": texts[language], "text_pair": other[language], "rephrases": [
                            {"text": sentence(language, 1, number), "text_pair": other[language]}]}
                        for language in FRAMES
                    },
                }
            )
        )  # fmt: skip
    return made


def memory(pair: bool = False) -> dict[str, list[Any]]:
    """Sentences about the names no request is about."""
    return {
        language: [
            {"text": sentence(language, 0, number), "text_pair": sentence(language, 1, number + 5) if pair else None}
            for number in range(20, 24)
        ]
        for language in FRAMES
    }


def task_of(model: Any, tokenizer: Any, requests: Any, seed: int = 0) -> Task:
    """What an editor is given, the model's parameters without gradients."""
    head = head_of(model)
    edits = resolve_edits(requests, labels_of(model, head.labels), None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cache = FeatureCache(model, tokenizer, head.site)
    return Task(model, head.site, head, edits, as_memory(memory(), edits), cache, seed, lambda *event: None)


def texts_of(requests: Any) -> list[str]:
    """Every text of the requests, rephrases included, and the memory's."""
    found = [v.text for request in requests for v in request.versions.values()]
    found += [p.text for request in requests for v in request.versions.values() for p in v.rephrases]
    return found + [item["text"] for items in memory().values() for item in items]


def logits_of_model(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """`[M, C]`."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).logits


# Random models tell texts apart far less than trained ones: bigger steps, and less weight on what must stay.
_NEURONS = {"steps": 400, "learning_rate": 0.05, "memory_weight": 0.5}
QUICK = {
    "mpn": _NEURONS,
    "mpn-masked": {**_NEURONS, "mask_least": 2, "mask_steps": 30},
    "mpn-only": _NEURONS,
    "t-patcher": _NEURONS,
    "ft": {"learning_rate": 1e-3, "steps": 100},
    "ft-l": {"learning_rate": 1e-2, "steps": 50, "box": 0.1, "memory_weight": 0.1},
    "calinet": {"steps": 100, "learning_rate": 0.02, "memory_weight": 0.1},
    "grace": {"steps": 100},
}


def quick_edit(model: Any, tokenizer: Any, requests: Any, method: str, **options: Any) -> Any:
    """`xpatch.edit` with the quick settings of a method and a small memory."""
    settings = {"memory": memory(), "progress": False, **QUICK[method], **options}
    return xpatch.edit(model, tokenizer, requests, method, **settings)
