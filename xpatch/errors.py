"""The error tree: every error a user can cause or meet derives from :class:`XpatchError`."""

from __future__ import annotations


class XpatchError(Exception):
    """Base of every error xpatch raises on purpose. The message says what, where, expected, found, and what to do next."""


class FormatError(XpatchError):
    """A file or request that cannot be read: broken JSON, an unknown field or version, a truncated or corrupted tensor file."""


class MismatchError(XpatchError):
    """A patch that does not fit this base model, or a request that does not fit it (an unknown label, site or language)."""


class ConflictError(XpatchError):
    """Two things that cannot hold at once: patch sets that contradict each other, inseparable edits, a compiled model."""


class BackendError(XpatchError):
    """A native or optional component that is missing, was built differently, or failed."""
