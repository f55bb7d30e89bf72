"""``BlobType``: the column type of a managed blob, and what is to be known of mapped classes.

Invariant: a value goes into a row only if its session has uploaded it for this statement, or if
it is a URI that an open result of the explicit strength was given; everything else is refused
here, however the statement came about. Comparisons take any URI.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from sqlalchemy import JSON, Column, ColumnElement, Text, event, inspect, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapper, object_session
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import ClauseElement, Null
from sqlalchemy.types import TypeDecorator, TypeEngine

from ._blob import NO_FACTS, Blob, BlobFacts, checked_content_type
from ._uri import UploadedUri
from .errors import InvalidInputError, InvalidPutArgumentsError, InvalidSourceError

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect
    from sqlalchemy.orm import QueryContext

    from ._store._base import Store

BlobFormat = Literal["uri", "json"]
PrefixOf = Callable[[Any], str]

DEFAULT_STORE: Final = "default"
STORES_OF_SESSION: Final = "aioblobcol.stores"
"""Where a session's ``info`` keeps its stores, by name."""

_OWNED_ARGUMENTS: Final = {
    "Bucket": "the store's",
    "Key": "made by the library",
    "Body": "the blob's",
    "ContentType": "BlobType(content_type=...)",
    "Metadata": "Blob(..., metadata=...)",
}


class BlobType(TypeDecorator[Blob]):
    """A column whose value is a `Blob`: the bytes in S3, the URI in the row.

    ::

        html: Mapped[Blob | None] = mapped_column(BlobType(content_type="text/html"))
        image: Mapped[Blob | None] = mapped_column(
            BlobType(max_bytes=20 * 2**20, accept=("image/*",))
        )

    Sessions that upload come from `blob_sessionmaker` or `track_blobs`.
    ``where(Task.html == "s3://...")`` works in both formats, with a stored blob, too.
    """

    impl = Text
    cache_ok = True
    hashable = False

    def __init__(
        self,
        # SQLAlchemy's cache key is made of positional parameters: those that a statement depends on
        format: BlobFormat = "uri",  # noqa: A002 - the word for it
        store: str = DEFAULT_STORE,
        *,
        content_type: str | None = None,
        max_bytes: int | None = None,
        accept: Sequence[str] = (),
        prefix: PrefixOf | None = None,
        put_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe a column.

        Args:
            format: ``uri``: a text column with the plain URI, which every other tool can read.
                ``json``: an object with ``uri``, ``size``, ``content_type``, ``sha256`` and
                ``filename`` (JSONB on PostgreSQL); `Task.html.uri` and `Task.html.size` are
                expressions then.
            store: the name of the store, of those that `blob_sessionmaker` was given.
            content_type: of blobs that do not have one of their own.
            max_bytes: what a blob may have at most.
            accept: content types that are accepted, such as ``image/*``; all by default. It is
                the declared type that is looked at, not the bytes.
            prefix: called with the mapped object (for a bulk statement: the dict of its
                values) when it is uploaded; what it returns stands in the key after the store's
                prefix, such as ``tenants/42``.
            put_arguments: more arguments of ``put_object``, such as ``StorageClass``.

        Raises:
            InvalidInputError: something of this is unusable.
        """
        super().__init__()
        if format not in {"uri", "json"}:
            raise InvalidInputError(f"format is 'uri' or 'json', not {format!r}")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InvalidInputError(f"max_bytes is a positive integer, not {max_bytes!r}")
        if isinstance(accept, str) or not all("/" in str(pattern) for pattern in accept):
            raise InvalidInputError(f"accept is a list such as ('image/*',), not {accept!r}")
        if not isinstance(store, str) or not store:
            raise InvalidInputError(f"store is the name of a store, not {store!r}")
        if prefix is not None and not callable(prefix):
            raise InvalidInputError("prefix is called with the mapped object: lambda task: ...")
        owned = _OWNED_ARGUMENTS.keys() & (put_arguments or {}).keys()
        if owned:
            hints = ", ".join(f"{name}: {_OWNED_ARGUMENTS[name]}" for name in sorted(owned))
            raise InvalidPutArgumentsError(f"put_arguments does not set what is set here: {hints}")
        if format == "json":
            self.impl = JSON(none_as_null=True)  # type: ignore[assignment]  # per instance
        self.format = format
        self.content_type = checked_content_type(content_type)
        self.max_bytes = max_bytes
        self.accept = tuple(accept)
        self.store = store
        # private: never a part of the cache key, for they need not be hashable
        self._prefix = prefix
        self._put_arguments = dict(put_arguments or {})

    def __repr__(self) -> str:
        shown = {
            "format": self.format if self.format != "uri" else None,
            "content_type": self.content_type,
            "max_bytes": self.max_bytes,
            "accept": self.accept or None,
            "store": self.store if self.store != DEFAULT_STORE else None,
        }
        return f"BlobType({', '.join(f'{k}={v!r}' for k, v in shown.items() if v is not None)})"

    @property
    def prefix(self) -> PrefixOf | None:
        """What gives a part of the key."""
        return self._prefix

    @property
    def put_arguments(self) -> Mapping[str, Any]:
        """More arguments of ``put_object``."""
        return self._put_arguments

    @property
    def python_type(self) -> type[Blob]:
        """`Blob`."""
        return Blob

    def accepts(self, content_type: str) -> bool:
        """Tell whether a content type matches ``accept``; its parameters do not count."""
        essence = content_type.partition(";")[0].strip().lower()
        return not self.accept or any(
            fnmatch.fnmatchcase(essence, pattern.lower()) for pattern in self.accept
        )

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return JSONB on PostgreSQL, and otherwise what the format says."""
        if self.format == "json" and dialect.name == "postgresql":
            return dialect.type_descriptor(JSONB(none_as_null=True))
        return self.impl_instance

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Return what goes into the row, or refuse it.

        Raises:
            BlobNotUploadedError, UnsafeTransactionError: of a `Blob`, see there.
            InvalidSourceError: anything else but an open result's URI.
        """
        if value is None:
            return None
        if isinstance(value, Blob):
            uri, facts = value._uri_for_statement(), value._facts
        elif isinstance(value, UploadedUri):
            uri, facts = value.for_statement(), NO_FACTS
        else:
            raise InvalidSourceError(describe_refusal(value))
        return uri if self.format == "uri" else {"uri": uri, **dataclasses.asdict(facts)}

    def process_result_value(self, value: Any, dialect: Dialect) -> Blob | None:  # noqa: ARG002
        """Return the stored `Blob` of a row."""
        if value is None:
            return None
        if isinstance(value, Mapping):
            facts = BlobFacts(**{name: value.get(name) for name in _FACTS})
            return Blob._stored(str(value.get("uri")), facts, store_name=self.store)
        return Blob._stored(str(value), NO_FACTS, store_name=self.store)

    class Comparator(TypeDecorator.Comparator[Any]):
        """Compares by URI; `uri` and `size` are expressions."""

        def operate(self, op: Any, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
            """Compare the URI, but for NULL."""
            if op in {operators.is_, operators.is_not} or any(each is None for each in other):
                return super().operate(op, *other, **kwargs)
            same = {operators.eq, operators.ne}  # asked of one and the same column by SQLAlchemy
            if op in same and isinstance(other[0], ClauseElement) and _is_twin(self.expr, other[0]):
                return super().operate(op, *other, **kwargs)
            if op not in {operators.in_op, operators.not_in_op}:
                other = tuple(map(_compared, other))
            return op(self.uri, *other, **kwargs)  # type: ignore[no-any-return]

        @property
        def uri(self) -> ColumnElement[str]:
            """The URI as text."""
            return _uri_of(self.expr, self._format)

        @property
        def size(self) -> ColumnElement[int]:
            """The length in bytes, of ``format="json"``."""
            if self._format != "json":
                raise InvalidInputError('a column of format "uri" knows no size; use format="json"')
            size = type_coerce(self.expr, JSON(none_as_null=True))["size"].as_integer()
            return cast("ColumnElement[int]", size)

        @property
        def _format(self) -> str:
            return str(getattr(self.expr.type, "format", "uri"))

    comparator_factory = Comparator


def _is_twin(one: Any, other: Any) -> bool:
    """Tell whether both are one column, annotated or not: then SQLAlchemy looks for identity."""
    return hash(one) == hash(other)


def _compared(other: Any) -> Any:
    """Return what a URI is compared with: of another managed column, its URI."""
    type_ = getattr(other, "type", None)
    return _uri_of(other, type_.format) if isinstance(type_, BlobType) else other


def _uri_of(expression: Any, format: str) -> ColumnElement[str]:  # noqa: A002 - the word for it
    if format == "json":
        expression = type_coerce(expression, JSON(none_as_null=True))["uri"].as_string()
    return type_coerce(expression, BlobUri())


class BlobUri(TypeDecorator[str]):
    """The URI in a comparison: takes strings and stored blobs."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Return the URI.

        Raises:
            BlobNotUploadedError: a pending blob has none.
        """
        return value.uri if isinstance(value, Blob) else value


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlobAttribute:
    """A mapped attribute with a `BlobType`.

    Attributes:
        label: what errors call the column: ``tasks.html``.
        roots: what its URIs begin with, by the store that has looked at the column's arguments.
    """

    key: str
    column: Column[Any]
    type: BlobType
    label: str
    roots: weakref.WeakKeyDictionary[Store, str] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )


def blob_attributes(mapper: Mapper[Any]) -> tuple[BlobAttribute, ...]:
    """Return the managed attributes of a mapped class, those of its base classes included.

    Columns only: what an SQL expression (``column_property``) names is another row's.

    Raises:
        InvalidInputError: a column has an ``onupdate`` or a ``server_default``.
    """
    known = _attributes.get(mapper)
    if known is None:
        known = tuple(
            BlobAttribute(prop.key, prop.columns[0], prop.columns[0].type, str(prop.columns[0]))
            for prop in mapper.column_attrs
            if isinstance(prop.columns[0], Column) and isinstance(prop.columns[0].type, BlobType)
        )
        for attribute in known:
            column = attribute.column
            if any((column.onupdate, column.server_onupdate, column.server_default)):
                raise InvalidInputError(
                    f"{column}: a managed column takes no onupdate, server_onupdate or "
                    "server_default, for nobody would see which object the row has, or lets go"
                )
        _attributes[mapper] = known
    return known


def row_attributes(mapper: Mapper[Any]) -> tuple[BlobAttribute, ...]:
    """Return those that the rows of a mapped class may hold: also of subclasses in its tables."""
    known = _row_attributes.get(mapper)
    if known is None:
        found = {each.column: each for each in blob_attributes(mapper)}
        for descendant in mapper.self_and_descendants:
            for each in blob_attributes(descendant):
                if each.column.table in mapper.tables:
                    found.setdefault(each.column, each)
        known = _row_attributes[mapper] = tuple(found.values())
    return known


def bind_blobs(instance: object, stores: Mapping[str, Store]) -> None:
    """Tell the stored blobs of a loaded object where they are read."""
    state = inspect(instance)
    assert state is not None
    for attribute in blob_attributes(state.mapper):
        blob = state.dict.get(attribute.key)
        if isinstance(blob, Blob):
            blob._bind(stores)


def as_uri(value: object) -> str | None:
    """Return the URI that a value of a column stands for: a string, or a stored blob."""
    if isinstance(value, Blob):
        return value._uri
    return value if isinstance(value, str) else None


def describe_refusal(value: object) -> str:
    """Say what to write in place of something that is no `Blob`."""
    if isinstance(value, str):
        return (
            f"a string is not written into a managed column: {value!r}. Assign Blob(...); or, of "
            "put_s3(), result.to_values() while its blob_transaction() or enlist() is open"
        )
    if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
        return (
            "a managed attribute takes a Blob or None and no SQL expression; to copy another "
            "row's, load it and assign blob.copy()"
        )
    return f"write Blob(...) around it: a managed column takes no {type(value).__name__}"


# --- every mapped class with managed attributes ----------------------------------------------

_FACTS = tuple(field.name for field in dataclasses.fields(BlobFacts))
_attributes: weakref.WeakKeyDictionary[Mapper[Any], tuple[BlobAttribute, ...]] = (
    weakref.WeakKeyDictionary()
)
_row_attributes: weakref.WeakKeyDictionary[Mapper[Any], tuple[BlobAttribute, ...]] = (
    weakref.WeakKeyDictionary()
)


@event.listens_for(Mapper, "mapper_configured")
def _instrument(mapper: Mapper[Any], mapped_class: type[Any]) -> None:
    """Watch what is assigned, and bind what is loaded."""
    _row_attributes.clear()  # a subclass may come later than the first look
    own = [attribute for attribute in blob_attributes(mapper) if _is_own(mapper, attribute)]
    for attribute in own:
        instrumented = getattr(mapped_class, attribute.key)
        event.listen(instrumented, "set", _check_assigned, propagate=True)
    if own and not event.contains(mapped_class, "load", _loaded):
        event.listen(mapped_class, "load", _loaded, propagate=True)
        event.listen(mapped_class, "refresh", _refreshed, propagate=True)


def _is_own(mapper: Mapper[Any], attribute: BlobAttribute) -> bool:
    if mapper.inherits is None:
        return True
    return attribute.key not in {each.key for each in blob_attributes(mapper.inherits)}


def _check_assigned(_target: object, value: object, _old: object, _initiator: object) -> None:
    # A string is looked at when it is flushed: an open result's URI is one.
    if value is not None and not isinstance(value, (Blob, str, Null)):
        raise InvalidSourceError(describe_refusal(value))


def _loaded(target: object, context: QueryContext | None) -> None:
    # a bulk statement that refreshes loaded objects gives no context
    session = context.session if context is not None else object_session(target)
    stores = session.info.get(STORES_OF_SESSION) if session is not None else None
    if stores is not None:
        bind_blobs(target, stores)


def _refreshed(target: object, context: QueryContext | None, _attributes: object) -> None:
    _loaded(target, context)
