"""What weights alone can hold of a patch set, and the words for what they cannot."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from xpatch.errors import ConflictError, MismatchError
from xpatch.patches.types import Part

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

_NAMES = {"neurons": "patch neurons", "lowrank": "low-rank deltas", "dense": "dense deltas"}
_ELSEWHERE = {
    "neurons": "`xpatch export widened` holds neurons of the FFN's own activation",
    "lowrank": "`xpatch export merged` and `xpatch export peft` hold low-rank deltas",
    "dense": "`xpatch export merged` holds dense deltas",
}


def held(patches: PatchSet, forms: Collection[str], what: str) -> dict[str, Part]:
    """The set's parts by name, where `what` ("a merged checkpoint") can hold them all.

    Raises `MismatchError` for a set without parts and for parts of other forms, `ConflictError` for a language mask or a gate: they
    choose by the row, and weights are the same for every row.
    """
    if not patches.parts:
        raise MismatchError(f"{what}: the set has no parts, so there is nothing to export; edit with it first")
    for name, part in patches.parts.items():
        if part.form not in forms:
            allowed = " and ".join(_NAMES[form] for form in forms)
            raise MismatchError(
                f"{what} holds {allowed} alone, found {_NAMES[part.form]} in part {name!r}; {_ELSEWHERE[part.form]}, and "
                "xpatch.apply serves every form"
            )
        if part.mask is not None:
            raise ConflictError(
                f"{what}: part {name!r} has the language mask {part.mask!r}, which is chosen for every row; weights are the same for all rows. "
                "Fold one language in with xpatch.patches.masks.fold_language, or serve the set with xpatch.apply"
            )
        if part.gate is not None:
            raise ConflictError(
                f"{what}: part {name!r} acts behind the gate {part.gate!r}, which opens for some rows; weights are the same for all rows. "
                "Serve the set with xpatch.apply"
            )
    return dict(patches.parts)
