"""Forks of a process that serves: the child finds what is published whole, and nobody else in the middle of a call."""

from __future__ import annotations

import os
import threading
from typing import Any

from xpatch.runtime import graph


def survive_forks(writers: Any) -> None:
    """Let a fork wait for the writer that holds the lock `writers`: its child must not inherit half of what is published."""

    def after_in_child() -> None:
        for runtime in graph.all_runtimes():
            for key in list(runtime._active):
                if key[0] != threading.get_ident():  # that thread is not here
                    runtime._active.pop(key)
        writers.release()

    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=writers.acquire, after_in_parent=writers.release, after_in_child=after_in_child)
