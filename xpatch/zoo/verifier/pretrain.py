"""Step 1 of the recipe: masked LM and translation LM on all facts in all languages. Resumable.

python -m xpatch.zoo.verifier.pretrain --out FOLDER --steps 12000
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from xpatch.zoo.verifier import checkpoint
from xpatch.zoo.verifier.corpus import Corpus
from xpatch.zoo.verifier.data import LABELS
from xpatch.zoo.verifier.tokenizer import MAX_LENGTH, build, save

SHAPES = (("mono", 256, 16), ("pair", 128, 32), ("pair", 128, 32), ("mono", 128, 32))  # (kind, sequences, tokens)
SHAPE_WEIGHTS = (0.45, 0.25, 0.25, 0.05)


def config(vocabulary: int) -> BertConfig:
    """The verifier's shape: small enough for 20 MB in fp16."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=320,
        num_hidden_layers=4,
        num_attention_heads=5,
        intermediate_size=1280,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        attn_implementation="eager",  # type: ignore[call-arg]
    )


def masked_lm_loss(model: BertForMaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy over the chosen positions only: the vocabulary projection is the dearest part of a small model."""
    names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
    hidden = model.bert(**{name: batch[name] for name in names}).last_hidden_state
    scores = model.cls(hidden.flatten(0, 1)[batch["index"]])
    return torch.nn.functional.cross_entropy(scores.float(), batch["target"], ignore_index=-100)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 300 steps, constant, then linear to zero over the last 30 %: a run can be prolonged before the decay."""
    return peak * min((step + 1) / 300, 1.0, max((steps - step) / (0.3 * steps), 0.0))


def pretrain(
    out: Path, steps: int, peak: float, minutes_per_checkpoint: float = 3.0, compiled: bool = True
) -> BertForMaskedLM:
    """Train to `steps`, continuing from `out` where a checkpoint is there."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    save(tokenizer, out)
    torch.manual_seed(0)
    model = BertForMaskedLM(config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start = checkpoint.load(out, model, optimizer)
    corpus = Corpus(tokenizer, seed=start)
    loss_of = torch.compile(masked_lm_loss, dynamic=False) if compiled else masked_lm_loss
    model.train()
    running: dict[str, float] = {}
    saved = tick = time.time()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        kind, size, length = corpus.rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
        batch = corpus.mono(size, length) if kind == "mono" else corpus.pair(size, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running[kind] = 0.98 * running.get(kind, loss.item()) + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            rate = (time.time() - tick) / 100
            tick = time.time()
            print(
                json.dumps(
                    {"step": step + 1, "s_per_step": round(rate, 3), **{k: round(v, 3) for k, v in running.items()}}
                ),
                flush=True,
            )
        if time.time() - saved > 60 * minutes_per_checkpoint or step + 1 == steps:
            checkpoint.save(out, model, optimizer, step + 1)
            saved = time.time()
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="do not compile the step")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pretrain(given.out, given.steps, given.learning_rate, compiled=not given.eager)
