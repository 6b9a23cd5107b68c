"""Small language models that know the bundled facts in six languages: what language-model edits are measured on.

    python -m xpatch.benchmarks.lm_bases --out FOLDER

`gpt2` is a decoder with a GELU FFN, `llama` one with a gated FFN (SwiGLU), `t5` an encoder-decoder. Each is trained from nothing to complete
every taught question (`lm_facts.py`), minutes a base on one core; a base that is there is not made again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xpatch import FormatError
from xpatch.zoo.verifier import data

from . import bases, cache, lm_facts

KINDS = ("gpt2", "llama", "t5")
WIDTH, LAYERS, HEADS, VOCABULARY, TOKENS = 256, 4, 4, 3000, 128
STEPS, BATCH, PEAK, WARMUP = 2000, 64, 1e-3, 100
IGNORED = -100


class Told(NamedTuple):
    """A lesson in tokens. read: the question, in a decoder with the answer behind it; answer: the tokens to be said, each behind what
    stands before it; shifted: what the decoder beside an encoder reads (None: there is none)."""

    read: tuple[int, ...]
    answer: tuple[int, ...]
    shifted: tuple[int, ...] | None = None


def make(
    folder: Path, kind: str, *, steps: int = STEPS, seed: int = 0, tell: Callable[[str], None] = lambda line: None
) -> Path:
    """Train the base `kind` into `folder / kind` and return that path; the share of answers it says is in `accuracy.json`.

    Raises `FormatError` for a kind there is not.
    """
    if kind not in KINDS:
        raise FormatError(f"there is no base {kind!r}; bases: {', '.join(KINDS)}")
    path = folder / kind
    if (path / "config.json").is_file():
        return path
    cache.prepare(folder)
    tokenizer = tokenizer_for(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_for(kind, tokenizer)
        found = _train(model, tokenizer, kind, random.Random(seed), steps, tell)
    return bases.keep(path, model, tokenizer, found)


def tokenizer_for(kind: str) -> Any:
    """A byte-level BPE of the lessons: every text comes back letter for letter. A decoder's texts begin with `<s>`, an encoder's end with `</s>`."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    core = ByteLevelBPETokenizer()
    lessons = lm_facts.lessons()
    core.train_from_iterator(
        [text for _, question, answer in lessons for text in (question, f" {answer}")],
        vocab_size=VOCABULARY,
        special_tokens=special,
        show_progress=False,
    )
    marked = (
        {"single": "$A </s>", "special_tokens": [("</s>", 2)]}
        if kind == "t5"
        else {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    )
    core._tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(**marked)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=TOKENS,
    )


def model_for(kind: str, tokenizer: Any) -> Any:
    """A base with random weights."""
    import transformers

    hf: Any = transformers
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = hf.GPT2Config(n_positions=TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens)  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    if kind == "llama":
        config = hf.LlamaConfig(hidden_size=WIDTH, intermediate_size=8 * WIDTH // 3, num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=TOKENS, tie_word_embeddings=True, **tokens)  # fmt: skip
        return hf.LlamaForCausalLM(config)
    config = hf.T5Config(d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=4 * WIDTH, num_layers=LAYERS // 2, num_decoder_layers=LAYERS // 2, num_heads=HEADS, dropout_rate=0.0, decoder_start_token_id=0, initializer_factor=0.5, **tokens)  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _train(
    model: Any, tokenizer: Any, kind: str, rng: random.Random, steps: int, tell: Callable[[str], None]
) -> dict[str, float]:
    """Teach every lesson; the share of answers whose every token is the likeliest, by language (teacher forcing)."""
    lessons = lm_facts.lessons()
    told = [tokens_of(tokenizer, kind, *lesson) for lesson in lessons]
    end = None if kind == "t5" else tokenizer.eos_token_id  # a decoder's answers end, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    order: list[int] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        if len(order) < BATCH:
            order = rng.sample(range(len(told)), len(told))
        rows, order = [told[index] for index in order[:BATCH]], order[BATCH:]
        inputs, labels = batch(rows, end)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            tell(json.dumps({"step": step + 1, "loss": round(loss.item(), 4)}))
    model.eval()
    return _accuracy(model, told, [language for language, _, _ in lessons])


def tokens_of(tokenizer: Any, kind: str, language: str, question: str, answer: str) -> Told:
    """A lesson as `xpatch.edit` forces it on a model of this kind: a space goes before an answer, but in Chinese."""
    if kind == "t5":
        said = tuple(tokenizer(text_target=answer)["input_ids"])
        return Told(tuple(tokenizer(question)["input_ids"]), said, (0, *said[:-1]))
    read = tokenizer(question)["input_ids"]
    whole = tokenizer(f"{question}{'' if language == 'zh' else ' '}{answer}")["input_ids"]
    assert whole[: len(read)] == read, question
    return Told(tuple(whole[:-1]), tuple(whole[len(read) :]))


def batch(rows: Sequence[Told], end: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`(inputs, labels)` of a batch; `labels [B, T]` are those of the stack that answers, `IGNORED` where nothing is asked.

    end: the token a decoder says behind its answer; None asks for none.
    """
    rows = [
        row if end is None else row._replace(read=(*row.read, row.answer[-1]), answer=(*row.answer, end))
        for row in rows
    ]
    ids, mask = _padded([row.read for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    answering = [row.read if row.shifted is None else row.shifted for row in rows]
    if rows[0].shifted is not None:
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = _padded(answering)
    labels = torch.full((len(rows), max(map(len, answering))), IGNORED)
    for index, (row, reads) in enumerate(zip(rows, answering, strict=True)):
        labels[index, len(reads) - len(row.answer) : len(reads)] = torch.tensor(row.answer)
    return inputs, labels


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


@torch.inference_mode()
def _accuracy(model: Any, told: Sequence[Told], languages: Sequence[str]) -> dict[str, float]:
    right: dict[str, list[bool]] = {language: [] for language in data.LANGUAGES}
    for start in range(0, len(told), BATCH):
        inputs, labels = batch(told[start : start + BATCH], None)
        said = model(**inputs).logits.argmax(-1)
        for index, hit in enumerate(((said == labels) | (labels == IGNORED)).all(1).tolist()):
            right[languages[start + index]].append(hit)
    return {language: round(100 * sum(hits) / len(hits), 1) for language, hits in right.items()}


if __name__ == "__main__":
    bases.command_line(__doc__, KINDS, STEPS, make)
