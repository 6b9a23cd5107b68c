"""A tiny model folder of each class, request files, and `run`: the command line in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

WORDS = "the capital of france germany is paris berlin die hauptstadt von frankreich deutschland ist la capitale de est allemagne".split()


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    from xpatch.cli import main

    def call(*words: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return call


def make_tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]"), "xlmr": ("<s>", "<pad>", "</s>", "<unk>")}[family]
    order = {"bert": (1, 3, 0, 2), "xlmr": (0, 1, 2, 3)}[family]
    vocabulary = [*(names[index] for index in order), *dict.fromkeys(WORDS), "."]
    ids = {word: index for index, word in enumerate(vocabulary)}
    first, pad, last, unknown = names
    core = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(name, ids[name]) for name in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token=first, sep_token=last, pad_token=pad, unk_token=unknown,
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_model(family: str, vocabulary: int, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "num_labels": 2, "id2label": {0: "REFUTES", 1: "SUPPORTS"}, "label2id": {"REFUTES": 0, "SUPPORTS": 1},
        "initializer_range": 0.5,
    }  # fmt: skip
    if family == "bert":
        config = transformers.BertConfig(max_position_embeddings=40, pad_token_id=0, **shape)
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.XLMRobertaConfig(max_position_embeddings=40, pad_token_id=1, **shape)
    return transformers.XLMRobertaForSequenceClassification(config).eval()


def answer_wrong(model: Any, tokenizer: Any) -> None:
    """Turn the classifier's sign if need be, so that it supports what the requests refute."""
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is Berlin.", return_tensors="pt")).logits[0]
        if logits[0] >= logits[1]:
            last = [module for module in model.classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
            last.weight.neg_()
            last.bias.neg_()


@pytest.fixture(scope="session", params=["bert", "xlmr"])
def any_model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as save_pretrained writes it, of each supported class."""
    return save_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", "bert")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same class and shape, other weights."""
    return save_model(tmp_path_factory.mktemp("model") / "other", "bert", seed=1)


def save_model(folder: Path, family: str, seed: int = 0) -> Path:
    tokenizer = make_tokenizer(family)
    model = make_model(family, len(tokenizer), seed)
    answer_wrong(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors: a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    return write_requests(tmp_path / "fixes.jsonl")


@pytest.fixture
def memory_file(tmp_path: Path) -> Path:
    return write_memory(tmp_path / "memory.jsonl")


@pytest.fixture(scope="session")
def trained(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch folder of two edits on `model_folder`, trained once by the command line."""
    from xpatch.cli import main

    place = tmp_path_factory.mktemp("trained")
    requests, memory = write_requests(place / "fixes.jsonl"), write_memory(place / "memory.jsonl")
    words = ("edit", "--model", model_folder, "--requests", requests, "--memory", memory, "--out", place / "fixes")
    torch.set_num_threads(1)
    assert main([str(word) for word in words]) == 0
    return place / "fixes"


@pytest.fixture
def patch_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, to be damaged or replaced."""
    return shutil.copytree(trained, tmp_path / "patch")


def write_memory(path: Path) -> Path:
    """Texts to keep, in the tiny model's few words: quicker than the bundled memory."""
    texts = {"en": "germany is the capital", "de": "deutschland ist die hauptstadt", "fr": "la capitale est berlin"}
    path.write_text(
        "".join(json.dumps({"language": code, "text": text}) + "\n" for code, text in texts.items()), encoding="utf-8"
    )
    return path


def write_requests(path: Path, target: str = "REFUTES") -> Path:
    request = {
        "id": "1",
        "text": "The capital of France is Berlin.",
        "target": target,
        "parallel": {"de": "Die Hauptstadt von Frankreich ist Berlin.", "fr": "La capitale de France est Berlin."},
    }
    # The same target, because a random model hardly tells two sentences apart.
    other = {**request, "id": "2", "text": "The capital of Germany is Paris.", "parallel": {}}
    path.write_text("".join(json.dumps(item) + "\n" for item in (request, other)), encoding="utf-8")
    return path
