"""What pydantic takes for a `Blob`, and what it writes of one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from support.uploads import Upload

from aioblobcol import Blob
from aioblobcol._blob import BlobFacts

URI = "s3://bucket/prefix/k"
UPLOADED = {"type": "string", "format": "binary"}


class Form(BaseModel):
    title: str = ""
    scan: Blob | None = None


class Row:
    """A mapped object, as far as pydantic can tell."""

    title = "t"
    scan = Blob._stored(URI, BlobFacts(4, "text/html", "ab", "p.html"))


class FromRow(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    scan: Blob | None


@pydantic_dataclass
class Checked:
    scan: Blob


@dataclass
class Plain:
    scan: Blob


class TestValidation:
    def test_an_upload(self) -> None:
        """An upload becomes a pending blob with its name and type, unread."""
        upload = Upload(b"cat", filename="cat.png", content_type="image/png")
        scan = Form(scan=upload).scan  # type: ignore[arg-type]

        assert repr(scan) == "<Blob pending, 3 bytes, image/png, cat.png>"
        assert upload.reads == 0

    @pytest.mark.parametrize("given", [b"page", bytearray(b"page"), memoryview(b"page")])
    def test_bytes(self, given: Any) -> None:
        """Bytes become a pending blob."""
        assert repr(Form(scan=given).scan) == "<Blob pending, 4 bytes>"

    @pytest.mark.parametrize("blob", [Blob(b"page"), Blob.from_uri(URI), None])
    def test_a_blob(self, blob: Blob | None) -> None:
        """A `Blob` is taken as it is."""
        assert Form(scan=blob).scan is blob

    def test_a_row(self) -> None:
        """A model that is made of a mapped object has the same blob."""
        assert FromRow.model_validate(Row()).scan is Row.scan

    @pytest.mark.parametrize(
        "given", [URI, "text", Path(__file__), 5, {"uri": URI}, {"size": 4}, [URI], Upload]
    )
    def test_nothing_else(self, given: Any) -> None:
        """No text, no path and no description is taken: a client never chooses an object."""
        with pytest.raises(ValidationError, match="a URI or other text is never taken") as caught:
            Form(scan=given)
        assert [(error["type"], error["loc"]) for error in caught.value.errors()] == [
            ("blob", ("scan",))
        ]

    @pytest.mark.parametrize("given", [URI, "cGFnZQ==", {"uri": URI}, 5, [], True])
    def test_nothing_from_json(self, given: Any) -> None:
        """JSON holds no upload, so nothing but null is taken from it."""
        assert Form.model_validate_json('{"scan": null}').scan is None
        with pytest.raises(ValidationError, match="a URI or other text is never taken"):
            Form.model_validate_json(json.dumps({"scan": given}))

    def test_nothing_from_strings(self) -> None:
        """Nor from a query or another form of text."""
        with pytest.raises(ValidationError, match="a URI or other text is never taken"):
            Form.model_validate_strings({"scan": URI})

    def test_an_unusable_upload(self) -> None:
        """What a client says of its upload is checked, and the reason is in the error."""
        with pytest.raises(ValidationError, match="not a content type"):
            Form(scan=Upload(b"cat", content_type="cat"))  # type: ignore[arg-type]

    @pytest.mark.parametrize("model", [Checked, Plain])
    def test_dataclasses(self, model: Any) -> None:
        """Dataclasses validate in the same way."""
        adapter = TypeAdapter(model)

        assert adapter.validate_python({"scan": b"page"}).scan.size == 4
        with pytest.raises(ValidationError):
            adapter.validate_python({"scan": URI})

    def test_a_type_adapter(self) -> None:
        """A `TypeAdapter` validates in the same way."""
        adapter = TypeAdapter(list[Blob])

        assert [blob.size for blob in adapter.validate_python([b"a", b"bc"])] == [1, 2]
        with pytest.raises(ValidationError):
            adapter.validate_json(json.dumps([URI]))


class TestSerialization:
    def test_json(self) -> None:
        """JSON has size, content type and file name, and no URI."""
        assert json.loads(FromRow.model_validate(Row()).model_dump_json()) == {
            "scan": {"size": 4, "content_type": "text/html", "filename": "p.html"}
        }
        assert json.loads(Form(scan=Blob.from_uri(URI)).model_dump_json())["scan"] == {
            "size": None,
            "content_type": None,
            "filename": None,
        }

    @pytest.mark.parametrize("context", [None, {}, {"blob_uri": False}, {"uri": True}])
    def test_no_uri_unless_asked_for(self, context: Any) -> None:
        """No other context makes the URI appear."""
        assert "s3:" not in FromRow.model_validate(Row()).model_dump_json(context=context)

    def test_the_uri(self) -> None:
        """The context ``blob_uri`` adds the URI, if there is one."""
        context = {"blob_uri": True}
        stored = FromRow.model_validate(Row()).model_dump(mode="json", context=context)
        pending = Form(scan=Blob(b"page")).model_dump(mode="json", context=context)

        assert stored["scan"]["uri"] == URI
        assert "uri" not in pending["scan"]

    def test_python(self) -> None:
        """A dump for Python keeps the blob, so that it can be assigned to a row."""
        blob = Blob(b"page")

        assert Form(scan=blob).model_dump()["scan"] is blob

    @pytest.mark.parametrize("model", [Checked, Plain])
    def test_dataclasses(self, model: Any) -> None:
        """Dataclasses and adapters write the same."""
        assert json.loads(TypeAdapter(model).dump_json(model(Blob(b"page")))) == {
            "scan": {"size": 4, "content_type": None, "filename": None}
        }


class TestJsonSchema:
    def test_of_what_is_validated(self) -> None:
        """What comes in is a file, also where it may be left out."""
        required = TypeAdapter(Checked).json_schema()["properties"]["scan"]
        optional = Form.model_json_schema()["properties"]["scan"]

        assert TypeAdapter(Blob).json_schema() == UPLOADED
        assert required == {"title": "Scan", **UPLOADED}
        assert optional["anyOf"] == [UPLOADED, {"type": "null"}]

    def test_of_what_is_written(self) -> None:
        """What goes out is an object with what the JSON has."""
        schema = Form.model_json_schema(mode="serialization")
        scan, null = schema["properties"]["scan"]["anyOf"]

        assert null == {"type": "null"}
        assert scan["type"] == "object"
        assert list(scan["properties"]) == ["size", "content_type", "filename", "uri"]
        assert scan["required"] == ["size", "content_type", "filename"]


class TestWithoutPydantic:
    def test_everything_else_works(self) -> None:
        """Neither import nor mapping needs pydantic, SQLModel or Alembic."""
        program = """
import sys
for name in ("pydantic", "pydantic_core", "alembic", "sqlmodel", "fastapi"):
    sys.modules[name] = None
import aioblobcol, aioblobcol.alembic
from sqlalchemy.orm import DeclarativeBase, Mapped, configure_mappers, mapped_column
class Base(DeclarativeBase): pass
class Task(Base):
    __tablename__ = "task"
    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[aioblobcol.Blob] = mapped_column(aioblobcol.BlobType())
configure_mappers()
print(repr(Task(html=aioblobcol.Blob(b"page")).html))
"""
        ran = subprocess.run(  # noqa: S603 - ours
            [sys.executable, "-W", "error", "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

        assert (ran.stderr, ran.stdout) == ("", "<Blob pending, 4 bytes>\n")
