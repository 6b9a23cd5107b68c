"""MPN's presets. `paper` is Transformer-Patcher's training with MPN's samplers; `default` is the best setting known."""

from __future__ import annotations

from xpatch.editors.t_patcher.config import PAPER, NeuronConfig

# What the paper leaves open, and what is taken here: the batch holds the language versions in turn (8 rows or more); the key is
# made from the edit's own (English) text; training stops when all trained versions are right; the language of "only" is
# drawn uniformly with the call's seed; "all" trains on all versions.

DEFAULT = NeuronConfig(
    activation="relu",
    rephrases=True,
    copies=1,
    memory_languages="all",
    memory_rows=12_000,
    memory_per_step=6000,
    memory_validation=0.0,
    learning_rate_end=0.1,
    steps=600,
    early_stop=False,
    max_neurons=2,
    rescue=True,
    keep_failed=False,
)

PRESETS = {"paper": PAPER, "default": DEFAULT}
