"""What lives while a store is open: second deletes, and how closing finishes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from aioblobcol._store._base import DeleteReport, Runtime

A, B, C = "s3://b/a", "s3://b/b", "s3://b/c"
NEVER = 3600.0


class Deletes:
    """Stands for a store's ``delete_many``, and notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.called = asyncio.Event()
        self.answers: list[DeleteReport | Exception] = []
        self.hang = False

    async def __call__(self, uris: Sequence[str]) -> DeleteReport:
        self.calls.append(tuple(uris))
        self.called.set()
        if self.hang:
            await asyncio.Event().wait()
        answer = self.answers.pop(0) if self.answers else DeleteReport(deleted=tuple(uris))
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
async def deletes() -> Deletes:
    return Deletes()


@pytest.fixture
async def runtime(deletes: Deletes) -> AsyncIterator[Runtime]:
    runtime = Runtime(deletes, max_concurrency=2, request_seconds=5)
    yield runtime
    await runtime.close(drain_seconds=0)


class TestSecondDeletes:
    async def test_they_are_made_when_due(self, runtime: Runtime, deletes: Deletes) -> None:
        """An object is deleted once more after its delay, without anybody asking."""
        runtime.delete_again(A, after_seconds=0)
        await deletes.called.wait()

        assert deletes.calls == [(A,)]
        assert runtime.second_deletes == ()

    async def test_not_before(self, runtime: Runtime, deletes: Deletes) -> None:
        """What is not due waits, while what is due goes."""
        runtime.delete_again(B, after_seconds=NEVER)
        runtime.delete_again(A, after_seconds=0)
        await deletes.called.wait()

        assert deletes.calls == [(A,)]
        assert runtime.second_deletes == (B,)

    async def test_an_earlier_one_wakes_the_sleeper(
        self, runtime: Runtime, deletes: Deletes
    ) -> None:
        """A delete that falls due earlier than the one that is waited for is not late."""
        runtime.delete_again(B, after_seconds=NEVER)
        for _ in range(3):
            await asyncio.sleep(0)  # the sweeper waits for B now
        runtime.delete_again(A, after_seconds=0)
        await deletes.called.wait()

        assert deletes.calls == [(A,)]

    async def test_one_after_the_other_is_over(self, runtime: Runtime, deletes: Deletes) -> None:
        """After all were made, another one is made as well."""
        runtime.delete_again(A, after_seconds=0)
        await deletes.called.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        deletes.called.clear()
        runtime.delete_again(B, after_seconds=0)
        await deletes.called.wait()

        assert deletes.calls == [(A,), (B,)]


class TestClose:
    async def test_what_is_left_is_made_at_once(self, runtime: Runtime, deletes: Deletes) -> None:
        """Closing makes every delete that is not due yet, in order, in one request."""
        for uri, seconds in ((C, NEVER + 2), (A, NEVER), (B, NEVER + 1)):
            runtime.delete_again(uri, after_seconds=seconds)
        await runtime.close(drain_seconds=0)

        assert deletes.calls == [(A, B, C)]
        assert runtime.second_deletes == ()

    async def test_without_any_it_does_nothing(self, runtime: Runtime, deletes: Deletes) -> None:
        """Closing what had nothing to do sends nothing."""
        await runtime.close(drain_seconds=NEVER)

        assert deletes.calls == []

    async def test_it_waits_for_what_falls_due_soon(
        self, runtime: Runtime, deletes: Deletes
    ) -> None:
        """Closing gives due deletes the time to be made by themselves."""
        runtime.delete_again(A, after_seconds=0)
        await runtime.close(drain_seconds=NEVER)

        assert deletes.calls == [(A,)]

    async def test_a_cancelled_close_still_makes_them(
        self, runtime: Runtime, deletes: Deletes
    ) -> None:
        """Cancelling the close lets the second deletes be made before it goes on."""
        runtime.delete_again(A, after_seconds=NEVER)
        closing = asyncio.create_task(runtime.close(drain_seconds=0))
        await asyncio.sleep(0)
        closing.cancel()

        with pytest.raises(asyncio.CancelledError):
            await closing
        assert deletes.calls == [(A,)]

    async def test_background_work_is_drained(self, runtime: Runtime) -> None:
        """Closing waits for the background work of requests that are over."""
        done: list[str] = []

        async def work() -> None:
            await asyncio.sleep(0)
            done.append("work")

        await runtime.background.submit(work(), seconds=5)
        await runtime.close(drain_seconds=0)

        assert done == ["work"]

    async def test_background_work_may_ask_for_one(
        self, runtime: Runtime, deletes: Deletes
    ) -> None:
        """A second delete that is asked for while closing is made, too."""

        async def work() -> None:
            await asyncio.sleep(0)
            runtime.delete_again(A, after_seconds=NEVER)

        await runtime.background.submit(work(), seconds=5)
        await runtime.close(drain_seconds=0)

        assert deletes.calls == [(A,)]


class TestTrouble:
    @pytest.mark.parametrize(
        "answer", [DeleteReport(failed={A: "AccessDenied"}), OSError("AccessDenied")]
    )
    async def test_a_failure_is_logged_and_the_others_go_on(
        self,
        runtime: Runtime,
        deletes: Deletes,
        caplog: pytest.LogCaptureFixture,
        answer: DeleteReport | Exception,
    ) -> None:
        """A second delete that fails goes to the log with its URI, and hinders no other."""
        deletes.answers = [answer]
        runtime.delete_again(A, after_seconds=0)
        await deletes.called.wait()
        runtime.delete_again(B, after_seconds=0)
        await runtime.close(drain_seconds=0)

        assert deletes.calls == [(A,), (B,)]
        (record,) = caplog.records
        assert record.__dict__["uri"] == A
        assert "AccessDenied" in record.getMessage()

    async def test_a_server_that_never_answers_is_given_up(
        self, deletes: Deletes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A delete without an answer ends with the request's time limit, and is logged."""
        runtime = Runtime(deletes, max_concurrency=2, request_seconds=0.01)
        deletes.hang = True
        runtime.delete_again(A, after_seconds=NEVER)
        await runtime.close(drain_seconds=0)

        assert A in caplog.text
