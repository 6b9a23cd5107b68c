"""Presets: frozen, checked configurations by name, and how a call's overrides change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from xpatch.errors import FormatError


class Config(BaseModel):
    """Base of every editor's configuration: frozen, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Config)


def resolve(method: str, presets: Mapping[str, C], preset: str, overrides: Mapping[str, Any]) -> C:
    """The preset with single fields replaced. Raises `FormatError` that lists the presets or the fields there are."""
    if preset not in presets:
        raise FormatError(f"method {method!r} has no preset {preset!r}; presets: {', '.join(sorted(presets))}")
    chosen = presets[preset]
    fields = type(chosen).model_fields
    for name in overrides:
        if name not in fields:
            raise FormatError(f"method {method!r} has no setting {name!r}; settings: {', '.join(sorted(fields))}")
    try:
        return type(chosen).model_validate({**chosen.model_dump(), **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise FormatError(f"method {method!r}, setting {name}: {first['msg']}; found {first.get('input')!r}") from None
