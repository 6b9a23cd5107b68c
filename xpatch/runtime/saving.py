"""`save_pretrained` of a patched model: the base's weights, and a word about the patches that are not among them."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpatch.patches.folders import discard, write_file

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime
    from xpatch.runtime.snapshot import AppliedSet

HINT_FILE = "xpatch_applied.json"


class SavePretrained:
    """Stands in for `model.save_pretrained`: saves the base as ever, leaves `xpatch_applied.json` beside it, and warns.

    The file names the applied sets by name and fingerprint, so that whoever loads the folder knows which patches to apply. Where no
    set is applied, one that an earlier save left there goes. In distributed training only the main process writes it.
    """

    def __init__(self, runtime: Runtime, before: Any) -> None:
        self.runtime = runtime
        self.before = before

    @property
    def __wrapped__(self) -> Any:
        model = self.runtime.model
        return self.before if self.before is not None else type(model).save_pretrained.__get__(model)  # type: ignore[attr-defined]

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(save_directory, *args, **kwargs)
        sets = self.runtime.snapshot.sets
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if not is_main_process or not Path(save_directory).is_dir():
            return result
        if not sets:
            discard(save_directory, HINT_FILE)
            return result
        write_file(save_directory, HINT_FILE, _hint(sets))
        warnings.warn(
            f"save_pretrained wrote the base model without its patches ({', '.join(map(repr, sets))}); keep those with "
            f"xpatch.save(patches, folder) and apply them after loading. {HINT_FILE} beside the weights names them",
            UserWarning,
            stacklevel=2,
        )
        return result


def _hint(sets: Mapping[str, AppliedSet]) -> bytes:
    listed = [
        {"name": name, "fingerprint": applied.fingerprint, "edits": len(applied.patches)}
        for name, applied in sets.items()
    ]
    note = {
        "note": "the weights here are the base alone; the patch sets below were applied to it when it was saved",
        "saved": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sets": listed,
    }
    return (json.dumps(note, ensure_ascii=False, indent=2) + "\n").encode()
