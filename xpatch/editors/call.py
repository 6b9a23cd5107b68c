"""Which edit call a checkpoint belongs to: all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from xpatch._version import __version__
from xpatch.patches.identity import BaseIdentity
from xpatch.patches.requests import EditRequest, Probe

_SHOWN = 12  # characters of a digest


class Call(BaseModel):
    """One call. requests: (id, digest) of each, in order; memory: digest of the texts; patches: fingerprints of the sets the model carries;
    versions: of what computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    settings: dict[str, Any]
    seed: int
    languages: tuple[str, ...] | None
    requests: tuple[tuple[str, str], ...]
    memory: str
    base: BaseIdentity
    patches: tuple[str, ...]
    versions: dict[str, str]

    def difference(self, now: Call) -> str | None:
        """The first thing that differs between this call and the one `now`, in words; None where nothing does."""
        for name in ("method", "seed", "languages"):
            then_, now_ = getattr(self, name), getattr(now, name)
            if then_ != now_:
                return f"{name} was {_plain(then_)}, now {_plain(now_)}"
        for where, then, other in (
            ("setting ", self.settings, now.settings),
            ("", self.versions, now.versions),
        ):
            for name in {**then, **other}:
                if then.get(name) != other.get(name):
                    return f"{where}{name} was {then.get(name)!r}, now {other.get(name)!r}"
        if self.requests != now.requests:
            return _other_requests(self.requests, now.requests)
        for name in BaseIdentity.model_fields:
            if getattr(self.base, name) != getattr(now.base, name):
                return f"the model is another (its {name.replace('_', ' ')})"
        if self.patches != now.patches:
            return f"patches on the model were {_listed(self.patches)}, now {_listed(now.patches)}"
        if self.memory != now.memory:
            return "the memory's texts are others"
        return None


def call_of(
    method: str, settings: Mapping[str, Any], seed: int, languages: Sequence[str] | None, requests: Sequence[EditRequest],
    memory: Mapping[str, Sequence[Probe]], base: BaseIdentity, patches: Sequence[str], device: str,
) -> Call:  # fmt: skip
    """The call with these arguments, as it comes back from JSON. memory: as it is used, defaults filled in."""
    return Call(
        method=method,
        settings=json.loads(json.dumps(dict(settings), default=str)),
        seed=seed,
        languages=None if languages is None else tuple(languages),
        requests=tuple((request.id, _digest(request.model_dump(mode="json"))[:_SHOWN]) for request in requests),
        memory=_digest(
            {language: [probe.model_dump(mode="json") for probe in found] for language, found in memory.items()}
        ),
        base=base,
        patches=tuple(patches),
        versions={"xpatch": __version__, "torch": torch.__version__, "device": device},
    )


def _other_requests(then: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> str:
    if len(then) != len(now):
        return f"requests were {len(then)}, now {len(now)}"
    number = next(place for place, (old, new) in enumerate(zip(then, now, strict=True)) if old != new)
    (old, _), (new, _) = then[number], now[number]
    return (
        f"request {number + 1} was {old!r}, now {new!r}"
        if old != new
        else f"request {number + 1}, {new!r}, was another"
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> str:
    return "not given" if value is None else repr(list(value) if isinstance(value, tuple) else value)


def _listed(fingerprints: Sequence[str]) -> str:
    return ", ".join(fingerprint[:_SHOWN] for fingerprint in fingerprints) or "none"
