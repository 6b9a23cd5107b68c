"""Step 2 of the recipe: claim classification in English only, on the "train" facts, while masked LM goes on in all languages.

    python -m xpatch.zoo.verifier.classify --pretrained FOLDER --out FOLDER --steps 1500

Labels are English; the validation facts choose the time to stop and one shift of the decision threshold (best mean accuracy
over the six languages).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from xpatch.errors import FormatError
from xpatch.zoo.verifier import checkpoint
from xpatch.zoo.verifier.corpus import Corpus
from xpatch.zoo.verifier.data import LABELS, TEMPLATES, claims, facts, sentence, wrong_object
from xpatch.zoo.verifier.facts import LANGUAGES
from xpatch.zoo.verifier.pretrain import config, masked_lm_loss
from xpatch.zoo.verifier.tokenizer import save

LENGTH = 24


def claims_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int, languages: Sequence[str] = ("en",)
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`size` claims on the classification facts, each fact once true and once with another object of its relation.

    Each fact is stated in one of `languages`, in turn at random where there are several.
    """
    texts: list[str] = []
    labels: list[int] = []
    while len(texts) < size:
        fact = rng.choice(facts("train"))
        wrong = wrong_object(fact, rng)
        if wrong is None:
            continue
        template = rng.randrange(TEMPLATES)
        language = rng.choice(languages) if len(languages) > 1 else languages[0]
        for label, obj in ((1, fact.labels[language][1]), (0, wrong[language])):
            texts.append(sentence(fact.relation, language, template, fact.labels[language][0], obj))
            labels.append(label)
    batch = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return dict(batch), torch.tensor(labels)


@torch.inference_mode()
def margins(
    model: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    templates: tuple[int, ...] = (0, 2),
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """language -> (logit of SUPPORTS minus logit of REFUTES, whether the claim is true) over a split's claims."""
    model.eval()
    found = {}
    for language in LANGUAGES:
        texts = [item.texts[language][template] for template in templates for item in claims(split)]
        scores = []
        for start in range(0, len(texts), 256):
            batch = tokenizer(texts[start : start + 256], padding=True, truncation=True, return_tensors="pt")
            logits = model(**batch).logits
            scores.append(logits[:, 1] - logits[:, 0])
        found[language] = (
            torch.cat(scores),
            torch.tensor([item.label == LABELS[1] for _ in templates for item in claims(split)]),
        )
    return found


def accuracy(found: dict[str, tuple[torch.Tensor, torch.Tensor]], shift: float = 0.0) -> dict[str, float]:
    """language -> share of claims classified right when `shift` is added to the logit of SUPPORTS."""
    return {language: ((score + shift > 0) == true).float().mean().item() for language, (score, true) in found.items()}


def best_shift(found: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The shift with the best mean accuracy: trained on English alone, the model doubts what it reads in other languages."""
    shifts = [step / 10 for step in range(-20, 31)]
    return max(shifts, key=lambda shift: (sum(accuracy(found, shift).values()), -abs(shift)))


def classify(
    pretrained: Path,
    out: Path,
    steps: int,
    peak: float,
    masked_lm_weight: float,
    frozen: int = 0,
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, float]:
    """Train, keep the best by validation accuracy, save model and tokenizer to `out`; returns the validation accuracies."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpus = Corpus(tokenizer, seed=seed + 10_000)
    masked = BertForMaskedLM(config(len(tokenizer)))
    if not checkpoint.load(pretrained, masked):
        raise FormatError(f"{pretrained} holds no {checkpoint.NAME}; run xpatch.zoo.verifier.pretrain first")
    model = BertForSequenceClassification(config(len(tokenizer)))
    model.bert.load_state_dict(masked.bert.state_dict(), strict=False)
    masked.bert = model.bert
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    masked.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    for module in [model.bert.embeddings, *model.bert.encoder.layer[: frozen - 1]] if frozen else []:
        module.requires_grad_(False)
    parameters = list({id(p): p for p in [*model.parameters(), *masked.parameters()] if p.requires_grad}.values())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    best: dict[str, torch.Tensor] = {}
    best_accuracy: dict[str, float] = {}
    tick = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 100, 1.0, max((steps - step) / (0.5 * steps), 0.02))
        model.train()
        batch, labels = claims_batch(tokenizer, rng, 128)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(**batch).logits.float(), labels)
            if masked_lm_weight > 0:
                extra = corpus.mono(128, 16) if rng.random() < 0.5 else corpus.pair(64, 32)
                loss = loss + masked_lm_weight * masked_lm_loss(masked, extra)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            scores = margins(model, tokenizer, "validation")
            shift = best_shift(scores)
            found = accuracy(scores, shift)
            mean = sum(found.values()) / len(found)
            line = {
                "step": step + 1,
                "loss": round(loss.item(), 3),
                "minutes": round((time.time() - tick) / 60, 1),
                "mean": round(mean, 3),
            }
            print(json.dumps({**line, **{k: round(v, 3) for k, v in found.items()}}), flush=True)
            if not best or mean > sum(best_accuracy.values()) / len(best_accuracy):
                best, best_accuracy = {k: v.clone() for k, v in model.state_dict().items()}, found
                best["classifier.bias"][1] += shift
    model.load_state_dict(best)
    model.half().save_pretrained(out)  # stored in fp16; every figure is measured on the stored file
    save(tokenizer, out)
    return best_accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--masked-lm-weight", type=float, default=0.0)
    parser.add_argument(
        "--frozen", type=int, default=2, help="0: train all; n: keep the embeddings and the first n - 1 layers"
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        json.dumps(
            classify(
                given.pretrained,
                given.out,
                given.steps,
                given.learning_rate,
                given.masked_lm_weight,
                given.frozen,
                given.dropout,
            )
        )
    )
