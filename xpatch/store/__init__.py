"""A store of patch sets: a folder or a bucket that keeps every published set, and pointers that say which one is served.

    store = xpatch.PatchStore("s3://team/patches")
    store.publish(patches, message="capital of X")     # -> Move: "production" names this set now
    patches = store.get("production")
    store.rollback("production", message="hurts de")

What lies in a store::

    xpatch_store.json                      the mark: this is a store, of this format version
    sets/9c/9c1b…/                         a set under its fingerprint: the folder that `xpatch.save` writes, never changed
    history/production/00000007.json       move 7 of the pointer "production": who, when, why, from which set to which
    tmp/                                   what is being written; `gc` empties it

**A pointer is the highest number in its history.** To move it, a writer reads move n and creates move n + 1, which must not
exist yet. Of two writers that both read n one creates n + 1 and the other gets `ConflictError`: compare-and-swap without a
lock, so nothing can stay locked. Entries are never rewritten, so the history cannot lose a move, and a pointer and its history
cannot disagree, for they are one thing. A set is whole and on disk before an entry can name it, and every reader checks its
fingerprint.

What "must not exist yet" rests on:

- **a local folder**: the entry is written and fsynced under another name, then hard-linked to its own (`os.link` fails where the
  name is taken; on Windows `os.rename` does), so it appears whole or not at all. Sets are written in `tmp/` and renamed. This
  holds between threads, processes and after kill -9. Where the file system has no hard links, the rename is made under an
  `flock`, which ends with its process: safe between processes of one machine.
- **s3://, gs://, az://**: a conditional put (`If-None-Match: *`, or the service's own form) through fsspec's
  `pipe_file(mode="create")`. A set's files are uploaded with the config last; without its config a set is not seen. Some servers and
  old clients accept the condition and ignore it, so a writer tries it once, on the mark, before it relies on it. Whatever
  error an upload ends in (a lost answer, a repeated request), the entry that lies there decides who won: each carries a token.
- **memory://**: the same under a lock; it lives in one process anyway.
- **anything else fsspec knows** (sftp, hf, webdav, …), or a server that fails the trial: no exclusive create. The store works
  for one writer at a time; it looks before it writes and reads back what it wrote, but two writers at the same moment may both believe they won,
  and then one move is lost. The first publish warns of this.

`gc` removes only sets that no history entry names, as source or as target, and that are older than a grace time: a publisher
uploads its set first and moves the pointer after. A set that lies there already is made young again by the publisher, gc
sets what it removes aside and reads the histories once more before it deletes, and the publisher looks for its set after the move.
"""

from __future__ import annotations

from xpatch.store.compare import EditChange, SetDiff
from xpatch.store.face import PatchStore
from xpatch.store.views import Collected, Damage, History, Listing, Move, StoredSet, Verification

__all__ = [
    "Collected",
    "Damage",
    "EditChange",
    "History",
    "Listing",
    "Move",
    "PatchStore",
    "SetDiff",
    "StoredSet",
    "Verification",
]
