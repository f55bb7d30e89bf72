"""What is compared: groups of contenders that take turns, and under which conditions.

A group runs on one stub with one latency and throughput. The first name of a contender is the
one that tables and goals use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

MIB: Final = 2**20
Scheme = Literal["http", "https"]


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """One library's way to do what a group compares.

    Attributes:
        name: in tables.
        act: ``module:function`` below `suite.contenders`, or a whole name.
        stream_bytes: if it differs from the group's.
        environment: in which it runs; None for that of the suite.
        is_slow: takes a fraction of the turns; its figures need no precision.
    """

    name: str
    act: str
    stream_bytes: int | None = None
    environment: str | None = None
    is_slow: bool = False

    @property
    def function(self) -> str:
        """The whole name of the function."""
        return self.act if self.act.startswith("suite.") else f"suite.contenders.{self.act}"


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Contenders that do the same.

    Attributes:
        name: in goals and files.
        title: in tables.
        contenders: in the order of the table.
        scheme: of the stub.
        latency_ms: of every answer.
        megabytes_per_second: of one connection; 0 is no limit.
        columns: of a row.
        blob_bytes: of a column.
        stream_bytes: of a large object.
        rows: of a bulk insert.
        batch_rows: rows of a transaction of it.
        rounds: in which everybody takes a turn.
        times: how often an act is done in a turn.
        warm_ups: before each turn, not timed.
        is_fresh: a new process for each turn, so that no memory is reused.
        watches_loop: measure the loop's stalls.
        counts: count the requests of one act.
        needs_object: let `PREPARE` upload the object that is read.
        measures: what its table shows.
    """

    name: str
    title: str
    contenders: Sequence[Contender]
    scheme: Scheme = "http"
    latency_ms: float = 0
    megabytes_per_second: float = 0
    columns: int = 1
    blob_bytes: int = 16 * 1024
    stream_bytes: int = 0
    rows: int = 0
    batch_rows: int = 1
    rounds: int = 15
    times: int = 1
    warm_ups: int = 0
    is_fresh: bool = False
    watches_loop: bool = False
    counts: bool = False
    needs_object: bool = False
    measures: Sequence[str] = ("wall", "cpu")


PREPARE: Final = Contender("who uploads what is to be read", "own:upload")

PUTS: Final = (
    Contender("raw socket, unsigned", "raw_socket:put"),
    Contender("obstore by hand", "raw_obstore:put"),
    Contender("aiobotocore, default", "raw_aiobotocore:put_default"),
    Contender("aiobotocore, tuned", "raw_aiobotocore:put_tuned"),
    Contender("aioblobcol", "own:put"),
    Contender("aioblobcol on obstore", "own:obstore_put"),
    Contender("advanced-alchemy", "with_advanced_alchemy:put"),
    Contender("boto3 in threads", "with_boto3:put"),
    Contender("aioboto3", "with_aioboto3:put", environment="aioboto3"),
    Contender("s3fs", "with_s3fs:put"),
)
GETS: Final = (
    Contender("raw socket, unsigned", "raw_socket:get"),
    Contender("obstore by hand", "raw_obstore:get"),
    Contender("aiobotocore, default", "raw_aiobotocore:get_default"),
    Contender("aiobotocore, tuned", "raw_aiobotocore:get_tuned"),
    Contender("aioblobcol", "own:get"),
    Contender("aioblobcol on obstore", "own:obstore_get"),
    Contender("advanced-alchemy", "with_advanced_alchemy:get"),
    Contender("boto3 in threads", "with_boto3:get"),
    Contender("aioboto3", "with_aioboto3:get", environment="aioboto3"),
    Contender("s3fs", "with_s3fs:get"),
)
FLOOR: Final = Contender("one PUT + commit", "raw_aiobotocore:create_floor")
CREATES: Final = (
    FLOOR,
    Contender("aioblobcol, explicit", "own:explicit_create"),
    Contender("aioblobcol, managed", "own:managed_create"),
    Contender("aioblobcol on obstore, explicit", "own:obstore_explicit_create"),
    Contender("aioblobcol on obstore, managed", "own:obstore_managed_create"),
    Contender("obstore by hand", "raw_obstore:create"),
    Contender("aiobotocore by hand, tuned", "raw_aiobotocore:create_tuned"),
    Contender("aiobotocore by hand, default", "raw_aiobotocore:create_default"),
    Contender("advanced-alchemy", "with_advanced_alchemy:create", is_slow=True),
    Contender("sqlalchemy-file", "with_sqlalchemy_file:create", is_slow=True),
    Contender("sqlalchemy_mate's order", "with_boto3:seed_create", is_slow=True),
)
UPDATES: Final = (
    FLOOR,
    Contender("aioblobcol, explicit", "own:explicit_update"),
    Contender("aioblobcol, managed", "own:managed_update"),
    Contender("aioblobcol on obstore, explicit", "own:obstore_explicit_update"),
    Contender("sqlalchemy_mate's order", "with_boto3:seed_update", is_slow=True),
)
UPLOADS: Final = (
    Contender("obstore by hand", "raw_obstore:upload"),
    Contender("aioblobcol", "own:upload"),
    Contender("aioblobcol, a quarter of the size", "own:upload", stream_bytes=256 * MIB),
    Contender("aioblobcol on obstore", "own:obstore_upload"),
    Contender("aiobotocore by hand, tuned", "raw_aiobotocore:upload_tuned"),
    Contender("aiobotocore by hand, default", "raw_aiobotocore:upload_default"),
    Contender("boto3 in threads", "with_boto3:upload"),
    Contender("s3fs", "with_s3fs:upload"),
)
DOWNLOADS: Final = (
    Contender("aiobotocore by hand, tuned", "raw_aiobotocore:download_tuned"),
    Contender("aioblobcol", "own:download"),
    Contender("aioblobcol on obstore", "own:obstore_download"),
    Contender("obstore by hand", "raw_obstore:download"),
    Contender("boto3 in threads", "with_boto3:download"),
)
STALLS: Final = (
    Contender("nothing", "suite.place:idle"),
    Contender("aioblobcol, bytes", "own:put_whole"),
    Contender("aioblobcol, file", "own:put_file"),
    Contender("aioblobcol, stream", "own:upload"),
    Contender("aioblobcol on obstore, bytes", "own:obstore_put_whole"),
    Contender("aiobotocore, default, bytes", "raw_aiobotocore:put_whole_default"),
    Contender("obstore by hand, stream", "raw_obstore:upload"),
)


def _creates(name: str, *, columns: int, rounds: int, counts: bool = False) -> Group:
    return Group(
        name,
        f"create a row of {columns} x 16 KiB, 20 ms away",
        CREATES,
        latency_ms=20,
        columns=columns,
        rounds=rounds,
        times=4,
        warm_ups=1,
        counts=counts,
    )


GROUPS: Final = (
    Group("put", "put 16 KiB", PUTS, times=40, warm_ups=4, rounds=50),
    Group(
        "put-https", "put 16 KiB over https", PUTS, scheme="https", times=40, warm_ups=4, rounds=50
    ),
    Group("get", "get 16 KiB", GETS, times=40, warm_ups=4, rounds=50),
    Group(
        "get-https", "get 16 KiB over https", GETS, scheme="https", times=40, warm_ups=4, rounds=50
    ),
    _creates("create-2", columns=2, rounds=8),
    _creates("create-4", columns=4, rounds=8),
    _creates("create-8", columns=8, rounds=20, counts=True),
    Group(
        "update-8",
        "replace the 8 x 16 KiB of a row, 20 ms away",
        UPDATES,
        latency_ms=20,
        columns=8,
        rounds=20,
        times=4,
        warm_ups=1,
        counts=True,
        measures=("wall", "settle"),
    ),
    Group(
        "fail-8",
        "create a row of 8 x 16 KiB whose commit fails, 20 ms away",
        (
            Contender("aioblobcol, explicit", "own:explicit_fail"),
            Contender("aioblobcol, managed", "own:managed_fail"),
            Contender("aioblobcol on obstore, explicit", "own:obstore_explicit_fail"),
        ),
        latency_ms=20,
        columns=8,
        rounds=3,
        counts=True,
        measures=("wall",),
    ),
    Group(
        "cpu-4", "create a row of 4 x 16 KiB", CREATES, columns=4, times=10, warm_ups=2, rounds=50
    ),
    Group(
        "cpu-4-https",
        "create a row of 4 x 16 KiB over https",
        CREATES,
        scheme="https",
        columns=4,
        times=10,
        warm_ups=2,
        rounds=30,
    ),
    Group(
        "upload",
        "upload 1 GiB of unknown length",
        UPLOADS,
        stream_bytes=1024 * MIB,
        rounds=5,
        is_fresh=True,
        measures=("throughput", "cpu", "growth"),
    ),
    Group(
        "upload-https",
        "upload 1 GiB of unknown length over https",
        UPLOADS,
        scheme="https",
        stream_bytes=1024 * MIB,
        rounds=5,
        is_fresh=True,
        measures=("throughput", "cpu", "growth"),
    ),
    Group(
        "download",
        "read 1 GiB",
        DOWNLOADS,
        stream_bytes=1024 * MIB,
        rounds=5,
        is_fresh=True,
        needs_object=True,
        measures=("throughput", "cpu", "growth"),
    ),
    Group(
        "ranges",
        "read 512 MiB into a file, 20 ms away, 90 MB/s per connection",
        (
            Contender("one GET", "raw_aiobotocore:download_to_file"),
            Contender("aioblobcol", "own:download_to_file"),
            Contender("aioblobcol on obstore", "own:obstore_download_to_file"),
        ),
        latency_ms=20,
        megabytes_per_second=90,
        stream_bytes=512 * MIB,
        rounds=5,
        is_fresh=True,
        needs_object=True,
        measures=("throughput", "cpu", "growth"),
    ),
    Group(
        "stall",
        "longest stall of the loop while 64 MiB go up",
        STALLS,
        stream_bytes=64 * MIB,
        rounds=9,
        is_fresh=True,
        watches_loop=True,
        measures=("stall", "throughput"),
    ),
    Group(
        "open",
        "longest stall of the loop while a client is opened",
        (
            Contender("aioblobcol", "own:open_own"),
            Contender("aioblobcol on obstore", "own:obstore_open"),
            Contender("aiobotocore, default", "raw_aiobotocore:open_default"),
        ),
        rounds=7,
        is_fresh=True,
        watches_loop=True,
        measures=("stall", "wall", "cpu"),
    ),
    Group(
        "bulk",
        "10,000 rows of 2 x 16 KiB in batches of 500",
        (
            Contender("aiobotocore by hand, tuned, and one INSERT", "raw_aiobotocore:bulk_tuned"),
            Contender("aioblobcol, managed", "own:managed_bulk"),
            Contender("aioblobcol on obstore, managed", "own:obstore_managed_bulk"),
        ),
        columns=2,
        rows=10_000,
        batch_rows=500,
        rounds=5,
        is_fresh=True,
        measures=("rows", "cpu", "growth"),
    ),
)


REPEATED: Final = frozenset(
    {"get-https", "create-2", "create-4", "cpu-4", "cpu-4-https", "upload-https"}
)
"""Groups whose acts others have, too: no part of a smoke test."""


def smoke(group: Group) -> Group:
    """Return a group that only shows that everything works, in a second or so."""
    contenders = [
        dataclasses.replace(each, stream_bytes=each.stream_bytes and 9 * MIB)
        for each in group.contenders
    ]
    return dataclasses.replace(
        group,
        contenders=contenders,
        latency_ms=min(group.latency_ms, 1),
        columns=min(group.columns, 2),
        stream_bytes=min(group.stream_bytes, 18 * MIB),
        rows=min(group.rows, 20),
        batch_rows=min(group.batch_rows, 10),
        rounds=1,
        times=1,
        warm_ups=0,
        is_fresh=True,
    )
