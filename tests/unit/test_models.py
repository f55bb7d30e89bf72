"""botocore's models, as our own reader reads them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from botocore.exceptions import UnknownServiceError
from botocore.loaders import create_loader

from aioblobcol._store._models import _shared_loader, new_session


@pytest.fixture
def collector() -> Iterator[None]:
    """Turn the garbage collector on again, whatever the test does to it."""
    yield
    gc.enable()


@pytest.fixture
def unread() -> None:
    """Forget what was read: botocore completes the models that its clients use."""
    _shared_loader.cache_clear()


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["endpoints", "partitions", "_retry"])
def test_general_data_are_those_of_botocore(name: str) -> None:
    """What our reader reads equals what botocore's own reads, order included."""
    ours = new_session().get_component("data_loader").load_data(name)
    theirs = create_loader().load_data(name)

    assert repr(ours) == repr(_plain(theirs))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", ["service-2", "endpoint-rule-set-1", "paginators-1", "waiters-2"])
def test_the_models_of_s3_are_those_of_botocore(name: str) -> None:
    """So it is with what describes S3, of which some files are compressed."""
    ours = new_session().get_component("data_loader").load_service_model("s3", name)
    theirs = create_loader().load_service_model("s3", name)

    assert repr(ours) == repr(_plain(theirs))


def test_sessions_share_them() -> None:
    """A second store reads nothing again."""
    first, second = (new_session().get_component("data_loader") for _ in range(2))

    assert first is second
    assert first.load_data("partitions") is second.load_data("partitions")


def test_a_path_of_the_users_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS_DATA_PATH is followed, and other paths do not see what is there."""
    path = tmp_path_factory.mktemp("models")
    service = path / "made-here" / "2026-01-01"
    service.mkdir(parents=True)
    (service / "service-2.json").write_text('{"metadata": {}}')
    monkeypatch.setenv("AWS_DATA_PATH", str(path))
    loader = new_session().get_component("data_loader")
    monkeypatch.delenv("AWS_DATA_PATH")

    assert loader.load_service_model("made-here", "service-2") == {"metadata": {}}
    with pytest.raises(UnknownServiceError):
        new_session().get_component("data_loader").load_service_model("made-here", "service-2")


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, *, is_on: bool
) -> None:
    """Reading pauses it; afterwards it is on or off, as before, also if the file is broken."""
    path = tmp_path_factory.mktemp("models")
    (path / "good.json").write_text("{}")
    (path / "broken.json").write_text("{")
    files = new_session().get_component("data_loader").file_loader
    (gc.enable if is_on else gc.disable)()

    assert files.load_file(str(path / "good")) == {}
    assert gc.isenabled() is is_on
    with pytest.raises(ValueError, match="line 1"):
        files.load_file(str(path / "broken"))
    assert gc.isenabled() is is_on
    assert files.load_file(str(path / "missing")) is None


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
