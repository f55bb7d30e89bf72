"""For tests, ours and yours: a store in memory, an S3 server, and whether both stores agree.

``pytest_plugins = ["aioblobcol.testing.fixtures"]`` gives the fixtures.
"""

from ._consistency import assert_consistent
from ._memory import Gate, MemoryStore, Step, StoredObject
from ._server import S3Server, s3_server

__all__ = [
    "Gate",
    "MemoryStore",
    "S3Server",
    "Step",
    "StoredObject",
    "assert_consistent",
    "s3_server",
]
