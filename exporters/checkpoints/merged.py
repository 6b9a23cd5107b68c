"""`export_merged`: deltas folded into a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpatch.exporters._bare import check_bare
from xpatch.exporters._written import written_together
from xpatch.exporters.checkpoints.compare import check_written
from xpatch.exporters.checkpoints.deltas import changes
from xpatch.exporters.checkpoints.files import WeightFiles
from xpatch.exporters.checkpoints.held import held
from xpatch.exporters.checkpoints.note import NOTE_FILE, write_note
from xpatch.patches.identity import check_fit

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet


def export_merged(model: Any, patches: PatchSet, out: str | Path, *, tokenizer: Any = None, check: bool = True) -> Path:
    """Write `model` with the deltas of `patches` in its weights to the folder `out`, as `save_pretrained` would, and return it.

    model: a Hugging Face model (`PreTrainedModel`) without patches; it is left as it was. patches: low-rank and dense deltas without masks
    and gates. Sums are made in fp32 and rounded once to the weights' dtype, one layer at a time: beside the model no more than one
    layer is in memory while writing. What a row computes then differs from `xpatch.apply` by rounding alone.

    check: load what was written and compare it with the patched model on random tokens before it is put in place. That needs a second
    model's memory and the time of a load; False for one that fits no second time, or takes other inputs than tokens.

    The folder appears as a whole or not at all; an earlier export there is replaced. Raises `MismatchError` (a set for another base, neurons,
    quantised or shared weights), `ConflictError` (masks, gates, patches applied to the model), `BackendError` (the folder does not
    compute what the patched model does, or cannot be called on tokens), `XpatchError` (a folder that holds other things).
    """
    check_bare(model)
    check_fit(patches, model, tokenizer)
    wanted = changes(model, held(patches, ("lowrank", "dense"), "a merged checkpoint"))
    with written_together(Path(out), NOTE_FILE) as folder:
        model.save_pretrained(folder)
        files = WeightFiles(folder)
        for name, change in wanted.items():
            files.change(name, change)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_note(folder, "merged", patches)
        if check:
            check_written(model, patches, folder)
    return Path(out)
