"""`export_peft`: low-rank deltas as a LoRA adapter that PEFT, vLLM and SGLang load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from xpatch.exporters._written import written_together
from xpatch.exporters.checkpoints.held import held
from xpatch.exporters.checkpoints.note import NOTE_FILE, write_note
from xpatch.patches.types import LowRankDelta

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

# A classifier has no task here: PEFT's would have the adapter bring the head's weights.
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"), ("MTModel", "SEQ_2_SEQ_LM"),
)  # fmt: skip


def export_peft(patches: PatchSet, out: str | Path, *, base_model: str | None = None) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` to the folder `out`, and return it.

    patches: low-rank deltas without masks and gates. base_model: what `base_model_name_or_path` names, by default where the set's base was
    loaded from. `lora_A` is down `[R, D_in]`, `lora_B` up `[D_out, R]`, with scale 1 (`lora_alpha` = `r`); layers of a lower rank are
    filled up with zeros, since some servers know one rank alone. PEFT's own version numbers are not needed to write it.

    The folder appears as a whole or not at all; an earlier export there is replaced. Raises `MismatchError` (no deltas, other forms),
    `ConflictError` (masks, gates), `XpatchError` (a folder that holds other things).
    """
    parts = held(patches, ("lowrank",), "a PEFT adapter")
    sites: dict[str, list[LowRankDelta]] = {}
    for part in parts.values():
        if isinstance(part, LowRankDelta):
            sites.setdefault(part.site, []).append(part)
    joined = {
        site: (torch.cat([part.down for part in found]), torch.cat([part.up for part in found], dim=1))
        for site, found in sites.items()
    }
    rank = max(1, *(len(down) for down, _ in joined.values())) if joined else 1
    tensors: dict[str, torch.Tensor] = {}
    for site, (down, up) in joined.items():
        more = rank - len(down)
        tensors[f"base_model.model.{site}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{site}.lora_B.weight"] = torch.nn.functional.pad(up, (0, more)).contiguous()
    base = patches.base
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS if base is not None and base.architecture.endswith(end)), None),
        "base_model_name_or_path": base_model or (base.origin if base is not None else None),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(joined),
        "inference_mode": True,
    }
    with written_together(Path(out), NOTE_FILE) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        write_note(folder, "peft", patches)
    return Path(out)
