"""Patches in formats that servers read today: a plain checkpoint (widened, merged) or a PEFT adapter. Each refuses what it cannot hold."""

from xpatch.exporters.checkpoints.merged import export_merged
from xpatch.exporters.checkpoints.peft import export_peft
from xpatch.exporters.checkpoints.widened import export_widened

__all__ = ["export_merged", "export_peft", "export_widened"]
