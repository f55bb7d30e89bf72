"""botocore's models: read once for all stores, and so that other threads can go on.

Invariants: what is read is what botocore's own loader reads, and is shared by clients as those of
one session of botocore share it (it completes what a client uses, for all in the same way); the
garbage collector is on again when nothing is being read.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiobotocore.session import get_session
from botocore.loaders import JSONFileLoader, create_loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiobotocore.session import AioSession


def new_session() -> AioSession:
    """Return a session of the environment; its clients share the models of all others."""
    session = get_session()
    loader = _shared_loader(session.get_config_variable("data_path"))
    session.register_component("data_loader", loader)
    return session


@functools.cache
def _shared_loader(search_path: str | None) -> Any:
    loader = create_loader(search_path)
    loader.file_loader = _PoliteFiles()
    return loader


class _PoliteFiles(JSONFileLoader):  # type: ignore[misc]  # botocore has no types
    """Reads a model without keeping the interpreter to itself.

    ``json`` in C lets no other thread run until a file is parsed, which takes 60 ms for the
    endpoints; between two calls of a function that is written in Python it does.
    """

    def load_file(self, file_path: str) -> Any:
        for path, read in ((f"{file_path}.json", _read), (f"{file_path}.json.gz", _read_zipped)):
            if Path(path).is_file():
                content = read(path)
                with _collector_paused():
                    return json.loads(content, object_hook=_same)
        return None


_reading = threading.Lock()


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector off, for one thread at a time.

    Ten thousand new objects that stay make it look at all others of the process, for longer than
    it took to make them, and nothing runs meanwhile.
    """
    with _reading:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()


def _same(parsed: dict[str, Any]) -> dict[str, Any]:
    return parsed


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _read_zipped(path: str) -> bytes:
    return gzip.decompress(_read(path))
