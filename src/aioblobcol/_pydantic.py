"""What pydantic makes of a `Blob`: uploads come in, a description goes out, never a URI.

A client may send bytes and never choose an object: validation takes uploads, bytes and `Blob`
objects only, and no text, from Python and from JSON. ``model_dump()`` leaves the `Blob` as it
is; JSON has its size, content type and file name.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic_core import PydanticCustomError, core_schema

from ._blob import Blob
from ._sources import is_async_source
from .errors import InvalidInputError

URI_IN_JSON: Final = "blob_uri"
"""``model_dump_json(context={"blob_uri": True})`` adds the URI."""

_UPLOADED: Final = {"type": "string", "format": "binary"}
_DESCRIBED: Final = {
    "title": "Blob",
    "type": "object",
    "properties": {
        "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "content_type": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "filename": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "uri": {"type": "string"},
    },
    "required": ["size", "content_type", "filename"],
}


def blob_schema() -> core_schema.CoreSchema:
    """Return how pydantic validates and serializes a `Blob`."""
    return core_schema.no_info_plain_validator_function(
        _validate,
        serialization=core_schema.plain_serializer_function_ser_schema(
            _describe, info_arg=True, when_used="json"
        ),
    )


def blob_json_schema(mode: str) -> dict[str, Any]:
    """Return what stands in an OpenAPI document, for ``validation`` or ``serialization``."""
    return dict(_UPLOADED if mode == "validation" else _DESCRIBED)


def _validate(value: Any) -> Blob:
    if isinstance(value, Blob):
        return value
    if not isinstance(value, (bytes, bytearray, memoryview)) and not is_async_source(value):
        raise PydanticCustomError(
            "blob", "an upload or a Blob is needed; a URI or other text is never taken"
        )
    try:
        return Blob(value)
    except InvalidInputError as exc:
        raise PydanticCustomError("blob", "{reason}", {"reason": str(exc)}) from exc


def _describe(blob: Blob, info: core_schema.SerializationInfo) -> dict[str, Any]:
    described: dict[str, Any] = {
        "size": blob.size,
        "content_type": blob.content_type,
        "filename": blob.filename,
    }
    if (info.context or {}).get(URI_IN_JSON) and blob.is_stored:
        described["uri"] = blob.uri
    return described
