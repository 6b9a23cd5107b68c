"""Seeing what patches do: which edits fired, what each moved, what a set would change, and which edits contradict each other."""

from __future__ import annotations

from xpatch.watch.conflicts import ConflictReport, check
from xpatch.watch.differences import Diff, diff
from xpatch.watch.explanation import Explanation, explain
from xpatch.watch.fired import FiringReport, firings
from xpatch.watch.texts import Text

__all__ = ["ConflictReport", "Diff", "Explanation", "FiringReport", "Text", "check", "diff", "explain", "firings"]
