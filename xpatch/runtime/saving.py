"""`save_pretrained` of a patched model: the base's weights, and a word about the patches that are not among them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpatch.runtime.attach import Runtime

HINT_FILE = "xpatch_applied.json"


class SavePretrained:
    """Stands in for `model.save_pretrained`: saves the base as ever, leaves `xpatch_applied.json` beside it, and warns.

    The file names the applied sets by name and fingerprint, so that whoever loads the folder knows which patches to apply.
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
        if sets:
            listed = [
                {"name": name, "fingerprint": applied.fingerprint, "edits": len(applied.patches)}
                for name, applied in sets.items()
            ]
            folder = Path(save_directory)
            if folder.is_dir():
                note = {"note": "these weights are the base; the patch sets below were applied to it", "sets": listed}
                temporary = folder / f".{HINT_FILE}.new"
                temporary.write_text(json.dumps(note, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
                temporary.replace(folder / HINT_FILE)
            warnings.warn(
                f"save_pretrained wrote the base model without its patches ({', '.join(map(repr, sets))}); keep those with "
                f"xpatch.save(patches, folder) and apply them after loading. {HINT_FILE} beside the weights names them",
                UserWarning,
                stacklevel=2,
            )
        return result
