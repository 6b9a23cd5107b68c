"""Bases for XME's axis "language of fine-tuning": the bundled verifier, its classification trained on in other languages.

    python -m xpatch.benchmarks.bases --out FOLDER

The bundled verifier's classification was trained in English. Each further base goes on from it on the same facts, stated in another
language, or in all in turn ("mixed"), with the embeddings kept; the validation facts choose when to stop and the threshold. Minutes
a base on one core; a base that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import xpatch
from xpatch import zoo
from xpatch.zoo.verifier.classify import accuracy, best_shift, claims_batch, margins

from . import cache

LANGUAGES: dict[str, tuple[str, ...]] = {"zh": ("zh",), "mixed": ("en", "de", "fr", "es", "zh", "ar")}
STEPS, BATCH, PEAK = 200, 64, 2e-4


def make(
    folder: Path,
    name: str,
    *,
    steps: int = STEPS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train the base `name` into `folder / name` and return that path; its validation accuracies are in `accuracy.json`."""
    path = folder / name
    if (path / "config.json").is_file():
        return path
    cache.prepare(folder)
    model, tokenizer = zoo.load("verifier")
    languages = LANGUAGES[name]
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        best, found = _train(model, tokenizer, languages, rng, steps, tell)
    model.load_state_dict(best)
    return keep(path, model, tokenizer, {k: round(100 * v, 1) for k, v in found.items()})


def keep(path: Path, model: Any, tokenizer: Any, accuracy: Mapping[str, float]) -> Path:
    """Write a base to the folder `path`, whole or not at all, with its accuracies (percent) in `accuracy.json`; returns `path`."""
    temporary = path.with_name(f"{path.name}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "accuracy.json").write_text(json.dumps(accuracy) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load(path: Path) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a made base, fp32, eval mode. Raises `FormatError` where there is none."""
    import transformers

    if not (path / "config.json").is_file():
        raise xpatch.FormatError(
            f"there is no base at {path}: expected a folder with config.json; make it with `python -m xpatch.benchmarks.bases` (classifiers) "
            "or `python -m xpatch.benchmarks.lm_bases`"
        )
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, local_files_only=True)
    return model.float().eval(), transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def _train(
    model: Any,
    tokenizer: Any,
    languages: Sequence[str],
    rng: random.Random,
    steps: int,
    tell: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The state with the best validation accuracy in the languages trained on (threshold shifted), and its accuracies."""
    model.bert.embeddings.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    best: dict[str, torch.Tensor] = {}
    best_found: dict[str, float] = {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / 20, (steps - step) / steps)
        model.train()
        batch, labels = claims_batch(tokenizer, rng, BATCH, languages)
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            scores = margins(model, tokenizer, "validation")
            shift = best_shift({language: scores[language] for language in languages})
            found = accuracy(scores, shift)
            tell(
                json.dumps(
                    {"step": step + 1, "loss": round(loss.item(), 3), **{k: round(v, 3) for k, v in found.items()}}
                )
            )
            if not best or _mean(found, languages) > _mean(best_found, languages):
                best, best_found = {k: v.clone() for k, v in model.state_dict().items()}, found
                best["classifier.bias"][1] += shift
    model.eval()
    return best, best_found


def _mean(found: dict[str, float], languages: Sequence[str]) -> float:
    return sum(found[language] for language in languages) / len(languages)


def command_line(about: str, names: Sequence[str], steps: int, make: Callable[..., Path]) -> None:
    """Read the arguments of a module that makes bases, and make them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", choices=names, default=list(names))
    parser.add_argument("--steps", type=int, default=steps)
    given = parser.parse_args()
    for name in given.bases:
        path = make(given.out, name, steps=given.steps, tell=lambda line: print(line, flush=True))
        print(path, (path / "accuracy.json").read_text(encoding="utf-8").strip())


if __name__ == "__main__":
    command_line(__doc__, list(LANGUAGES), STEPS, make)
