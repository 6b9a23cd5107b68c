"""The verifier's tokenizer: one BPE vocabulary, its share per script fixed, so that zh and ar names stay short.

Three BPE models (Latin, Chinese, Arabic) are trained on labels and template fragments and merged; scripts do not overlap, so
their merges do not interfere. Text is lower-cased and stripped of accents, as multilingual BERT uncased does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from xpatch.zoo.verifier.data import facts, sentence, templates
from xpatch.zoo.verifier.facts import LANGUAGES

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHARES = {"latin": 6200, "zh": 2900, "ar": 2900}
MAX_LENGTH = 64


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
    )


def _pre_tokenizer(spaces: bool = True) -> pre_tokenizers.PreTokenizer:
    punctuation = pre_tokenizers.Split(Regex(r"\p{P}"), "isolated")
    if not spaces:
        return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), punctuation])
    return pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), punctuation])


def _texts(script: str) -> list[str]:
    """Training text of one script: sentences where words are separated by spaces, loose labels and fragments for Chinese."""
    if script == "zh":
        labels = [label for fact in facts() for label in fact.labels["zh"]]
        fragments = [
            part for patterns in templates()["zh"].values() for p in patterns for part in re.split(r"\[[XY]\]", p)
        ]
        return labels * 4 + fragments * 50
    languages = ("ar",) if script == "ar" else tuple(language for language in LANGUAGES if language not in ("zh", "ar"))
    return [
        sentence(fact.relation, language, index, *fact.labels[language])
        for fact in facts()
        for language in languages
        for index in (0, 1)
    ]


def _train(script: str, size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces and merges of one script's own BPE model."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer(spaces=script != "zh")
    tokenizer.train_from_iterator(
        _texts(script), trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def build() -> PreTrainedTokenizerFast:
    """Train the three vocabularies and return the merged fast tokenizer."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    merges: list[tuple[str, str]] = []
    for character in "abcdefghijklmnopqrstuvwxyz0123456789▁":
        vocabulary.setdefault(character, len(vocabulary))
    for script, size in SHARES.items():
        pieces, found = _train(script, size)
        for piece in pieces:
            vocabulary.setdefault(piece, len(vocabulary))
        known = set(merges)
        merges += [merge for merge in found if merge not in known]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="[UNK]"))
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name every supported transformers version knows; newer ones write a name older ones do not."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in found.items() if name not in ("backend", "is_local", "local_files_only")}
    path.write_text(
        json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n", encoding="utf-8"
    )
