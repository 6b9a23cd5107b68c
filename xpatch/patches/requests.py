"""What an edit is asked to do: `EditRequest`, one request for all languages, and its readers (objects, dicts, JSONL)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from xpatch.errors import FormatError
from xpatch.patches.jsonl import read_jsonl, shorten

REQUEST_SCHEMA_VERSION = 1


def _integer_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_TEXT_OR_INTEGER = [{"type": "string"}, {"type": "integer"}]
Id = Annotated[
    str,
    Field(min_length=1),
    BeforeValidator(_integer_as_text),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]}),
]
Target = Annotated[
    str | None,
    BeforeValidator(_integer_as_text),
    WithJsonSchema({"anyOf": [*_TEXT_OR_INTEGER, {"type": "null"}], "default": None}),
]


class _Asked(BaseModel):
    """What a probe and a version have in common: a plain string stands for its text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler.resolve_ref_schema(handler(schema))]}


class Probe(_Asked):
    """One text (or text pair) a model is asked about. A plain string is accepted for the text alone.

    `target` is the expected answer; `None` means the request's own target (rephrases) or "whatever the base says" (locality).
    """

    text: str = Field(min_length=1)
    text_pair: str | None = None
    target: Target = None


class Version(_Asked):
    """One language's wording of an edit."""

    text: str = Field(min_length=1)
    text_pair: str | None = None
    target: Target = None
    subject: str | None = None
    rephrases: tuple[Probe, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()

    @property
    def probe(self) -> Probe:
        """The edited text itself as a probe."""
        return Probe(text=self.text, text_pair=self.text_pair, target=self.target)


class EditRequest(BaseModel):
    """One edit in every language it is known in.

    `versions` maps a language code to its `Version`; `language` names the one the edit was written in; `target` is shared by
    the versions that name none (a class label, as in the model's `label2id`, or its index as a string).

    The flat form `{"id", "text", "target", "language", "parallel": {lang: text}, "rephrases": [...]}` is accepted as sugar.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Id
    versions: dict[str, Version] = Field(min_length=1)
    language: str = "en"
    target: Target = None
    old_target: Target = None
    author: str | None = None
    reason: str | None = None
    expires: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "text" not in value:
            return value
        if "versions" in value:
            raise ValueError("give either 'text' (flat form) or 'versions', not both")
        flat = dict(value)
        language = flat.get("language", "en")
        own = {
            name: flat.pop(name)
            for name in ("text", "text_pair", "subject", "rephrases", "locality", "portability")
            if name in flat
        }
        parallel = flat.pop("parallel", None) or {}
        if not isinstance(parallel, Mapping):
            raise ValueError("'parallel' must map a language code to a text")
        if language in parallel:
            raise ValueError(f"'parallel' repeats the edit's own language {language!r}")
        return {**flat, "versions": {language: own, **parallel}}

    @model_validator(mode="after")
    def _has_own_language(self) -> EditRequest:
        if not all(code.strip() for code in self.versions):
            raise ValueError("a version has an empty language code; give one such as 'en'")
        if self.language not in self.versions:
            raise ValueError(f"language {self.language!r} has no version; versions are {sorted(self.versions)}")
        return self

    def target_of(self, language: str) -> str | None:
        """The target of one version: its own, else the shared one."""
        own = self.versions[language].target
        return self.target if own is None else own


def as_requests(
    requests: Iterable[EditRequest | Mapping[str, Any]] | EditRequest | Mapping[str, Any] | str | Path,
) -> list[EditRequest]:
    """Objects, dicts, one of them, or the path of a JSONL file -> a checked, non-empty list with unique ids.

    Raises `FormatError` naming the line (or position) and what is wrong with it.
    """
    if isinstance(requests, (str, Path)):
        return read_requests(requests)
    if isinstance(requests, (EditRequest, Mapping)):
        requests = [requests]
    parsed = [
        item if isinstance(item, EditRequest) else _parse(item, where=f"request {position}")
        for position, item in enumerate(requests, start=1)
    ]
    return _checked(parsed, where="the requests given")


def read_requests(path: str | Path) -> list[EditRequest]:
    """Read a JSONL file, one request a line (blank lines are skipped). Raises `FormatError` naming the line and its content."""
    parsed = [_parse(data, where=where) for where, data in read_jsonl(path, "request file", "request")]
    return _checked(parsed, where=str(path))


def write_requests(requests: Iterable[EditRequest], path: str | Path) -> None:
    """Write requests as JSONL, through a temporary file. Raises `FormatError` where it cannot be written."""
    path = Path(path)
    text = "".join(json.dumps(r.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n" for r in requests)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        raise FormatError(
            f"request file {path} cannot be written: {error.strerror or error}; check its folder and permissions"
        ) from None


def request_schema() -> dict[str, Any]:
    """The JSON schema of one request line, in full or in flat form (committed as `request.schema.json`)."""
    full = EditRequest.model_json_schema()
    definitions = full.pop("$defs")
    own = {name: field for name, field in definitions["Version"]["anyOf"][1]["properties"].items() if name != "target"}
    parallel = {"anyOf": [full["properties"]["versions"], {"type": "null"}]}
    parallel["anyOf"][0] = {key: value for key, value in parallel["anyOf"][0].items() if key != "minProperties"}
    shared = {name: field for name, field in full["properties"].items() if name != "versions"}
    flat = {
        "title": "EditRequest (flat form)",
        "description": "One text in `language`, and its translations in `parallel`.",
        "type": "object",
        "additionalProperties": False,
        "properties": {**shared, **own, "parallel": parallel},
        "required": ["id", "text"],
    }
    return {"$id": f"xpatch-request-v{REQUEST_SCHEMA_VERSION}", "$defs": definitions, "anyOf": [full, flat]}


def _parse(data: Any, *, where: str) -> EditRequest:
    if not isinstance(data, Mapping):
        raise FormatError(
            f"{where}: expected a JSON object with 'id' and 'text' (or 'versions'), found {shorten(repr(data))}"
        )
    try:
        return EditRequest.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "request"
        raise FormatError(
            f"{where}: {field}: {first['msg']}; found {shorten(json.dumps(dict(data), ensure_ascii=False, default=repr))}"
        ) from None


def _checked(requests: list[EditRequest], *, where: str) -> list[EditRequest]:
    if not requests:
        raise FormatError(f"{where} hold no edit request; give at least one")
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise FormatError(f"{where}: request id {request.id!r} occurs twice; ids must be unique")
        seen.add(request.id)
    return requests
