"""`BlobType`: its arguments, what it lets into a statement, and what mapped classes refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Mapper,
    aliased,
    column_property,
    declared_attr,
    mapped_column,
    registry,
)
from sqlalchemy.schema import CreateColumn

from aioblobcol import Blob, BlobType
from aioblobcol._blob import BlobFacts
from aioblobcol._column import BlobFormat, blob_attributes
from aioblobcol._uri import UploadedUri
from aioblobcol.errors import (
    BlobNotUploadedError,
    InvalidInputError,
    InvalidPutArgumentsError,
    InvalidSourceError,
    ResultSpentError,
    UnsafeTransactionError,
)

URI = "s3://bucket/prefix/k"
DIALECTS = {"sqlite": sqlite.dialect(), "postgresql": asyncpg()}  # type: ignore[no-untyped-call]
FACTS = BlobFacts(size=4, content_type="text/html", sha256="ab", filename="p.html")


class Base(DeclarativeBase):
    type_annotation_map = {Blob: BlobType(content_type="text/plain")}  # noqa: RUF012 - SQLAlchemy's


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[Blob | None] = mapped_column(BlobType())
    other: Mapped[Blob | None]
    required: Mapped[Blob]


class Json(Base):
    __tablename__ = "json"
    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[Blob | None] = mapped_column(BlobType(format="json"))
    other: Mapped[Blob | None] = mapped_column(BlobType(format="json"))


class Admitted:
    """A transaction that admits."""

    def __init__(self) -> None:
        self.sent: list[Blob] = []

    def sends(self, blob: Blob) -> None:
        self.sent.append(blob)


def sql(expression: Any, dialect: str) -> str:
    """Compile *expression*; casts, names of tables and of parameters do not matter."""
    text = str(expression.compile(dialect=DIALECTS[dialect]))
    text = re.sub(r"__\[POSTCOMPILE_\w+\]|\$\d", "?", text)
    text = re.sub(r"::\w+|CAST| AS \w+|FROM (plain|json)\b|\b(plain|json)(_1)?\.|[()]", " ", text)
    text = re.sub(r"SELECT 1 WHERE 1!=1", "?", text)
    return " ".join(text.split())


def bind(type_: BlobType, value: object, dialect: str = "sqlite") -> Any:
    return type_.process_bind_param(value, DIALECTS[dialect])


def load(type_: BlobType, value: object) -> Blob:
    blob = type_.process_result_value(value, DIALECTS["sqlite"])
    assert blob is not None
    return blob


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "advice"),
        [
            ({"format": "text"}, "'uri' or 'json'"),
            ({"content_type": "png"}, "image/png"),
            ({"max_bytes": 0}, "positive"),
            ({"max_bytes": True}, "positive"),
            ({"max_bytes": "20M"}, "positive"),
            ({"max_bytes": 1.5}, "positive"),
            ({"accept": "image/*"}, "a list such as"),
            ({"accept": [".png"]}, "a list such as"),
            ({"accept": [5]}, "a list such as"),
            ({"store": ""}, "name of a store"),
            ({"store": None}, "name of a store"),
            ({"prefix": "tenants"}, "lambda"),
        ],
    )
    def test_unusable_ones(self, arguments: dict[str, Any], advice: str) -> None:
        """An argument that makes no sense is refused where the column is written."""
        with pytest.raises(InvalidInputError, match=advice):
            BlobType(**arguments)

    @pytest.mark.parametrize("name", ["Bucket", "Key", "Body", "ContentType", "Metadata"])
    def test_what_put_arguments_do_not_set(self, name: str) -> None:
        """What has a place of its own is no put argument, and the error names the place."""
        with pytest.raises(InvalidPutArgumentsError, match=f"{name}: "):
            BlobType(put_arguments={name: "x"})

    def test_put_arguments_are_copied(self) -> None:
        """What the caller does to the dict afterwards changes nothing."""
        given = {"StorageClass": "STANDARD_IA"}
        made = BlobType(put_arguments=given)
        given.clear()

        assert made.put_arguments == {"StorageClass": "STANDARD_IA"}

    @pytest.mark.parametrize(
        ("accept", "content_type", "accepted"),
        [
            ((), "anything/else", True),
            (("image/*",), "image/png", True),
            (("image/*",), "IMAGE/PNG", True),
            (("IMAGE/PNG",), "image/png", True),
            (("image/*",), "text/html", False),
            (("image/*",), "application/image/png", False),
            (("text/html",), "text/html; charset=utf-8", True),
            (("text/html",), "text/htmlx", False),
            (("image/png", "text/*"), "text/plain", True),
            (("*/*",), "anything/else", True),
        ],
    )
    def test_accept(self, accept: tuple[str, ...], content_type: str, *, accepted: bool) -> None:
        """Patterns are compared with the type and subtype, in any case, without parameters."""
        assert BlobType(accept=accept).accepts(content_type) is accepted

    @pytest.mark.parametrize(
        ("made", "shown"),
        [
            (BlobType(), "BlobType()"),
            (
                BlobType(
                    format="json",
                    content_type="image/png",
                    max_bytes=5,
                    accept=["image/*"],
                    store="archive",
                ),
                (
                    "BlobType(format='json', content_type='image/png', max_bytes=5, "
                    "accept=('image/*',), store='archive')"
                ),
            ),
        ],
    )
    def test_repr_is_the_call_that_makes_it(self, made: BlobType, shown: str) -> None:
        """The repr can be evaluated: Alembic writes it into migrations by default."""
        assert repr(made) == shown
        assert repr(eval(shown)) == shown  # noqa: S307 - ours

    def test_its_python_type(self) -> None:
        """The value of a column is a `Blob`."""
        assert BlobType().python_type is Blob


class TestCacheKey:
    def key(self, **arguments: Any) -> Any:
        return sa.select(
            sa.type_coerce(sa.column("x"), BlobType(**arguments))
        )._generate_cache_key()

    def test_equal_arguments_share_it(self) -> None:
        """Statements on equal columns are compiled once."""
        arguments = {"format": "json", "max_bytes": 5, "accept": ["image/*"], "store": "archive"}

        assert self.key() == self.key()
        assert self.key(**arguments) == self.key(**arguments)

    @pytest.mark.parametrize("arguments", [{"format": "json"}, {"store": "archive"}])
    def test_what_a_statement_depends_on(self, arguments: dict[str, Any]) -> None:
        """Another format or store is another statement."""
        assert self.key(**arguments) != self.key()

    def test_what_cannot_be_hashed(self) -> None:
        """Arguments of the upload alone do not keep a statement out of the cache."""

        class Prefix:
            def __eq__(self, other: object) -> bool:
                return self is other

            __hash__ = None  # type: ignore[assignment]  # the point

            def __call__(self, _task: object) -> str:
                return "tenant"

        prefix = Prefix()
        key = self.key(prefix=prefix, put_arguments={"Tagging": "a=b", "Headers": ["x"]})

        assert key == self.key()
        assert {key.key: 1}[key.key] == 1
        assert BlobType(prefix=prefix).prefix is prefix


class TestWriting:
    def uploaded(self) -> tuple[Blob, Admitted]:
        owner = Admitted()
        blob = Blob._stored(URI, FACTS)
        blob._admitted_by = owner
        return blob, owner

    @pytest.mark.parametrize("format", ["uri", "json"])
    def test_nothing(self, format: BlobFormat) -> None:
        """None is NULL."""
        assert bind(BlobType(format=format), None) is None

    def test_what_its_session_has_admitted(self) -> None:
        """An admitted blob gives its URI, and its transaction learns that it is sent."""
        blob, owner = self.uploaded()

        assert bind(BlobType(), blob) == URI
        assert owner.sent == [blob]

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_as_json(self, dialect: str) -> None:
        """In format json the row holds all that is known, as JSON."""
        blob, _ = self.uploaded()
        made = BlobType(format="json").dialect_impl(DIALECTS[dialect])
        process = made.bind_processor(DIALECTS[dialect])
        assert process is not None
        written = process(blob)

        assert (json.loads(written) if isinstance(written, str) else written) == {
            "uri": URI,
            "size": 4,
            "content_type": "text/html",
            "sha256": "ab",
            "filename": "p.html",
        }

    def test_the_uri_of_an_open_result(self) -> None:
        """A URI that `put_s3` handed out is written, as a plain string."""
        uri = UploadedUri(URI, lambda: None)

        assert type(bind(BlobType(), uri)) is str
        assert bind(BlobType(format="json"), uri)["uri"] == URI

    def test_the_uri_of_a_result_that_is_over(self) -> None:
        """A result that is settled gives its URI into no row any more."""

        def check() -> None:
            raise ResultSpentError("its transaction ended")

        with pytest.raises(ResultSpentError):
            bind(BlobType(), UploadedUri(URI, check))

    @pytest.mark.parametrize("format", ["uri", "json"])
    @pytest.mark.parametrize(
        ("value", "error", "advice"),
        [
            (Blob(b"page"), BlobNotUploadedError, "blob_sessionmaker"),
            (Blob.from_uri(URI), UnsafeTransactionError, r"blob\.copy\(\)"),
            (Blob.from_uri(URI).copy(), BlobNotUploadedError, "blob_sessionmaker"),
            (URI, InvalidSourceError, r"to_values\(\)"),
            ("page", InvalidSourceError, r"Blob\(\.\.\.\)"),
            (b"page", InvalidSourceError, r"Blob\(\.\.\.\).*bytes"),
            ({"uri": URI}, InvalidSourceError, "dict"),
        ],
        ids=["pending", "stored", "copy", "URI", "text", "bytes", "dict"],
    )
    def test_what_is_refused(
        self, format: BlobFormat, value: object, error: type[Exception], advice: str
    ) -> None:
        """Everything else is refused, whatever the statement, with what to write instead."""
        with pytest.raises(error, match=advice):
            bind(BlobType(format=format), value)

    def test_a_literal_is_refused(self) -> None:
        """Nor does a value that is rendered into the statement's text get through."""
        statement = sa.insert(Plain).values(id=1, html=URI)
        with pytest.raises(sa.exc.CompileError) as caught:
            statement.compile(compile_kwargs={"literal_binds": True})
        assert isinstance(caught.value.__cause__, InvalidSourceError)


class TestLoading:
    @pytest.mark.parametrize("format", ["uri", "json"])
    def test_nothing(self, format: BlobFormat) -> None:
        """NULL is None."""
        made = BlobType(format=format)

        assert made.process_result_value(None, DIALECTS["sqlite"]) is None

    def test_a_uri(self) -> None:
        """A plain URI is a stored blob that knows nothing more, not even its store."""
        blob = load(BlobType(store="archive"), URI)

        assert (blob.uri, blob.size, blob._store, blob._store_name) == (URI, None, None, "archive")

    def test_json(self) -> None:
        """JSON tells what it holds; what another tool added or left out does not matter."""
        row = {"uri": URI, "size": 4, "content_type": "text/html", "version": 2}
        blob = load(BlobType(format="json"), row)

        assert (blob.uri, blob.size, blob.content_type) == (URI, 4, "text/html")
        assert (blob.sha256, blob.filename) == (None, None)

    @pytest.mark.parametrize(
        ("format", "dialect", "expected"),
        [
            ("uri", "sqlite", "x TEXT"),
            ("uri", "postgresql", "x TEXT"),
            ("json", "sqlite", "x JSON"),
            ("json", "postgresql", "x JSONB"),
        ],
    )
    def test_its_column(self, format: BlobFormat, dialect: str, expected: str) -> None:
        """The column is text, or JSON, or JSONB on PostgreSQL."""
        column = sa.Table("t", sa.MetaData(), sa.Column("x", BlobType(format=format))).c.x

        assert str(CreateColumn(column).compile(dialect=DIALECTS[dialect])) == expected


BLOB = Blob.from_uri(URI)
COMPARISONS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda html: html == URI, "{uri} = ?"),
    (lambda html: html == BLOB, "{uri} = ?"),
    (lambda html: html != URI, "{uri} != ?"),
    (lambda html: html == sa.bindparam("given"), "{uri} = ?"),
    (lambda html: html.in_([URI, BLOB]), "{uri} IN ?"),
    (lambda html: html.not_in([]), "{uri} NOT IN ?"),
    (lambda html: html.in_(sa.bindparam("given", expanding=True)), "{uri} IN ?"),
    (lambda html: html.startswith("s3://"), "{uri} LIKE ? || '%'"),
    (lambda html: html.is_distinct_from(URI), "{uri} {DISTINCT} ?"),
    (lambda html: html.is_not_distinct_from(BLOB), "{uri} {NOT DISTINCT} ?"),
    (lambda html: html == html.parent.class_.other, "{uri} = {other}"),
    (lambda html: html.in_(sa.select(html.parent.class_.other.uri)), "{uri} IN SELECT {other}"),
    (lambda html: html.asc(), "{uri} ASC"),
    (lambda html: html.desc().nulls_last(), "{uri} DESC NULLS LAST"),
    (lambda html: html.uri, "{uri}"),
    (lambda html: aliased(html.parent.class_).html == URI, "{uri} = ?"),
    (lambda html: html.parent.class_.__table__.c.html == URI, "{uri} = ?"),
    (lambda html: html.is_(None), "html IS NULL"),
    (lambda html: html == None, "html IS NULL"),  # noqa: E711 - SQL
    (lambda html: html.is_(sa.null()), "html IS NULL"),
    (lambda html: html.is_not(None), "html IS NOT NULL"),
    (lambda html: html != None, "html IS NOT NULL"),  # noqa: E711 - SQL
    (lambda html: html.is_not_distinct_from(None), "html {NOT DISTINCT} NULL"),
]
WORDS = {
    "sqlite": {"DISTINCT": "IS NOT", "NOT DISTINCT": "IS"},
    "postgresql": {"DISTINCT": "IS DISTINCT FROM", "NOT DISTINCT": "IS NOT DISTINCT FROM"},
}
URI_OF = {
    (Plain, "sqlite"): "{}",
    (Plain, "postgresql"): "{}",
    (Json, "sqlite"): "JSON_EXTRACT {}, ?",
    (Json, "postgresql"): "{} ->> ?",
}


class TestComparing:
    @pytest.mark.parametrize("dialect", DIALECTS)
    @pytest.mark.parametrize("mapped", [Plain, Json])
    @pytest.mark.parametrize("case", range(len(COMPARISONS)))
    def test_compares_uris(self, mapped: type[Plain | Json], dialect: str, case: int) -> None:
        """Comparisons take a URI or a stored blob, compare the URI as text, and know NULL."""
        compare, expected = COMPARISONS[case]
        uri = URI_OF[mapped, dialect]
        words = {"uri": uri.format("html"), "other": uri.format("other"), **WORDS[dialect]}

        assert sql(compare(mapped.html), dialect) == expected.format(**words)

    @pytest.mark.parametrize(
        ("value", "expected"), [(URI, URI), (BLOB, URI), (None, None)], ids=["text", "blob", "None"]
    )
    def test_what_is_bound(self, value: object, expected: str | None) -> None:
        """What is compared is sent as a plain URI."""
        parameter = (Plain.html == sa.bindparam("given")).right
        process = parameter.type.dialect_impl(DIALECTS["sqlite"]).bind_processor(DIALECTS["sqlite"])

        assert process is not None
        assert process(value) == expected
        with pytest.raises(BlobNotUploadedError):
            process(Blob(b"page"))

    @pytest.mark.parametrize(
        ("dialect", "expected"),
        [("sqlite", "JSON_EXTRACT html, ? > ?"), ("postgresql", "html ->> ? > ?")],
    )
    def test_size(self, dialect: str, expected: str) -> None:
        """In format json the size can be compared."""
        assert sql(Json.html.size > 4, dialect) == expected

    def test_size_of_a_uri(self) -> None:
        """A plain URI knows no size, and the error says which format does."""
        with pytest.raises(InvalidInputError, match='format="json"'):
            Plain.html.size  # noqa: B018 - raises


class Mixin:
    @declared_attr
    def declared(cls) -> Mapped[Blob | None]:  # noqa: N805 - SQLAlchemy's
        return mapped_column(BlobType())

    shared: Mapped[Blob | None] = mapped_column(BlobType())


class Mixed(Mixin, Base):
    __tablename__ = "mixed"
    id: Mapped[int] = mapped_column(primary_key=True)


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    photo: Mapped[Blob | None]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Cat(Animal):  # a table of its own
    __tablename__ = "cat"
    id: Mapped[int] = mapped_column(sa.ForeignKey("animal.id"), primary_key=True)
    purr: Mapped[Blob | None]
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012


class Dog(Animal):  # in its parent's table
    bark: Mapped[Blob | None]
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


class Robot(Base):
    __tablename__ = "robot"
    id: Mapped[int] = mapped_column(primary_key=True)
    manual: Mapped[str | None]


class Drone(Robot):  # nothing shared, and another type under the same name
    __tablename__ = "drone"
    id: Mapped[int] = mapped_column(primary_key=True)
    manual: Mapped[Blob | None]  # type: ignore[assignment]
    __mapper_args__ = {"concrete": True}  # noqa: RUF012


class DataBase(MappedAsDataclass, DeclarativeBase):
    pass


class Data(DataBase):
    __tablename__ = "data"
    id: Mapped[int] = mapped_column(primary_key=True)
    html: Mapped[Blob | None] = mapped_column(BlobType(), default=None)


class Imperative:
    html: Any

    def __init__(self, html: object = None) -> None:
        self.html = html


mapped_by_hand = registry()
mapped_by_hand.map_imperatively(
    Imperative,
    sa.Table(
        "imperative",
        mapped_by_hand.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("page", BlobType()),
    ),
    properties={"html": mapped_by_hand.metadata.tables["imperative"].c.page},
)

ATTRIBUTES: list[tuple[type[Any], str]] = [
    (Plain, "html"),
    (Plain, "other"),
    (Plain, "required"),
    (Json, "html"),
    (Mixed, "declared"),
    (Mixed, "shared"),
    (Animal, "photo"),
    (Cat, "photo"),
    (Cat, "purr"),
    (Dog, "photo"),
    (Dog, "bark"),
    (Drone, "manual"),
    (Imperative, "html"),
]


def make(mapped: type[Any]) -> Any:
    return Data(id=1) if mapped is Data else mapped()


@pytest.mark.parametrize(("mapped", "key"), [*ATTRIBUTES, (Data, "html")])
class TestAssigning:
    @pytest.mark.parametrize(
        ("value", "advice"),
        [
            (b"page", "write Blob.* no bytes"),
            (bytearray(b"page"), "write Blob.* no bytearray"),
            (Path(__file__), "write Blob.* no PosixPath"),
            ({"uri": URI}, "write Blob.* no dict"),
            (Plain.html, "no SQL expression"),
            (sa.func.lower("x"), "no SQL expression"),
            (sa.text("NULL"), "no SQL expression"),
        ],
        ids=["bytes", "bytearray", "path", "dict", "attribute", "function", "text"],
    )
    def test_what_is_no_blob(self, mapped: type[Any], key: str, value: Any, advice: str) -> None:
        """What is no `Blob` is refused where it is assigned, with what to write instead."""
        instance = make(mapped)
        with pytest.raises(InvalidSourceError, match=advice):
            setattr(instance, key, value)
        assert getattr(instance, key) is None

    @pytest.mark.parametrize("value", [Blob(b"page"), Blob.from_uri(URI), None, sa.null(), URI])
    def test_what_is_taken(self, mapped: type[Any], key: str, value: object) -> None:
        """A `Blob`, None and `null()` are taken; text is looked at when it is flushed."""
        instance = make(mapped)
        setattr(instance, key, value)

        assert getattr(instance, key) is value

    def test_in_the_constructor(self, mapped: type[Any], key: str) -> None:
        """The constructor assigns, and refuses."""
        arguments = {"id": 1} if mapped is Data else {}
        with pytest.raises(InvalidSourceError):
            mapped(**arguments, **{key: b"page"})


class TestMappedClasses:
    @pytest.mark.parametrize(("mapped", "key"), ATTRIBUTES)
    def test_attributes_are_found(self, mapped: type[Any], key: str) -> None:
        """Every managed attribute of a class is known, with its column."""
        found = {each.key: each for each in blob_attributes(sa.inspect(mapped))}

        assert isinstance(found[key].type, BlobType)
        assert isinstance(found[key].column, sa.Column)

    def test_a_subclass_that_comes_later(self) -> None:
        """A class that is mapped after its parent is in use refuses as well."""
        Animal(photo=Blob(b"cat"))

        class Bird(Animal):
            song: Mapped[Blob | None] = mapped_column(use_existing_column=True)
            __mapper_args__ = {"polymorphic_identity": "bird"}  # noqa: RUF012

        for key in ("photo", "song"):
            with pytest.raises(InvalidSourceError):
                Bird(**{key: b"page"})

    @pytest.mark.parametrize(
        "argument",
        [
            {"onupdate": sa.null()},
            {"server_onupdate": sa.FetchedValue()},
            {"server_default": "s3://bucket/placeholder"},
        ],
        ids=lambda argument: next(iter(argument)),
    )
    def test_values_that_nobody_assigned(self, argument: dict[str, Any]) -> None:
        """A value that the database or the column makes is refused, each time it is asked for."""

        class Own(DeclarativeBase):
            pass

        class Made(Own):
            __tablename__ = "made"
            id: Mapped[int] = mapped_column(primary_key=True)
            html: Mapped[Blob | None] = mapped_column(BlobType(), **argument)

        for _ in range(2):
            with pytest.raises(InvalidInputError, match="server_default"):
                blob_attributes(Made.__mapper__)
        Own.registry.dispose()

    def test_what_an_expression_names_is_not_its_own(self) -> None:
        """A `column_property` shows another row's blob, and no flush or delete concerns it."""

        class Viewer(Base):
            __tablename__ = "viewer"
            id: Mapped[int] = mapped_column(primary_key=True)
            html: Mapped[Blob | None]

        expression = sa.select(Plain.html).where(Plain.id == Viewer.id).scalar_subquery()
        Viewer.shown = column_property(expression)
        mapper: Mapper[Any] = sa.inspect(Viewer)

        assert isinstance(mapper.attrs["shown"].columns[0].type, BlobType)
        assert [each.key for each in blob_attributes(mapper)] == ["html"]

    def test_mapped_blob_needs_no_type(self) -> None:
        """`Mapped[Blob]` finds its type in `type_annotation_map`, and its nullability."""
        table = Plain.metadata.tables["plain"]

        assert isinstance(table.c.required.type, BlobType)
        assert table.c.required.type.content_type == "text/plain"
        assert (table.c.required.nullable, table.c.other.nullable) == (False, True)
