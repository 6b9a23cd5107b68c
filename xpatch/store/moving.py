"""What a move that cannot be made is told, and which set a rollback goes to."""

from __future__ import annotations

from xpatch.errors import ConflictError, MismatchError
from xpatch.store.journal import earlier
from xpatch.store.views import Move, short


def conflict(url: str, pointer: str, expected: str | None, found: Move | None, wanted: str | None) -> ConflictError:
    """Another set than `expected` is what the pointer names. wanted: the set that is now not published."""
    there = "nothing"
    hint = "check the pointer's name, or leave expect out"
    if found is not None:
        there = f"{short(found.after)} (moved by {found.author or 'somebody'} at {found.time})"
        look = f"diff {url} {short(expected)} {short(found.after)}" if expected else f"history {url} {pointer}"
        hint = f"see what came between with `xpatch store {look}`, take it in, and try again"
    wish = f"; {short(wanted)} was not published" if wanted else ""
    return ConflictError(
        f"{url}, pointer {pointer!r}: expected it to name {short(expected)}, found {there}{wish}; {hint}"
    )


def steps_back(url: str, pointer: str, moves: tuple[Move, ...], steps: int) -> str:
    """The set so many published sets ago. Raises `MismatchError` where there are not so many."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise MismatchError(f"rollback(steps=...): expected a whole number from 1 up, found {steps!r}")
    stack = earlier(moves)
    if steps >= len(stack):
        raise MismatchError(
            f"{url}, pointer {pointer!r}: expected {steps} earlier to go back to, found {len(stack) - 1}; "
            f"look at `xpatch store history {url} {pointer}`"
        )
    return stack[-1 - steps]


def named_before(url: str, pointer: str, moves: tuple[Move, ...], target: str) -> str:
    """`target`, if the pointer has ever named it. Raises `MismatchError` otherwise."""
    if all(target != move.after for move in moves):
        raise MismatchError(
            f"{url}, pointer {pointer!r}: expected a set it has named before, found {short(target)}; "
            "publish that set to this pointer instead"
        )
    return target
