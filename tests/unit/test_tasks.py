"""Reflexes of asyncio: what must be finished is finished, and the cancellation goes on."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aioblobcol._tasks import Background, run_in_thread, run_to_end, wait_through


class Work:
    """Something to do that the test can watch and end."""

    def __init__(self, *, fails_with: Exception | None = None) -> None:
        self.started = asyncio.Event()
        self.may_end = asyncio.Event()
        self.is_done = False
        self.was_cancelled = False
        self._fails_with = fails_with

    async def __call__(self) -> str:
        self.started.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        self.is_done = True
        if self._fails_with is not None:
            raise self._fails_with
        return "done"

    async def silently(self) -> None:
        await self()


@pytest.fixture
async def work() -> Work:
    return Work()


async def give_way(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


class TestRunToEnd:
    async def test_it_returns_what_the_work_returns(self, work: Work) -> None:
        """Undisturbed work is awaited like any other."""
        work.may_end.set()

        assert await run_to_end(work(), seconds=5) == "done"

    async def test_it_raises_what_the_work_raises(self) -> None:
        """The error of the work arrives."""
        work = Work(fails_with=LookupError("no such row"))
        work.may_end.set()

        with pytest.raises(LookupError, match="no such row"):
            await run_to_end(work(), seconds=5)

    @pytest.mark.parametrize("times", [1, 2, 5])
    async def test_a_cancelled_caller_finishes_first(self, work: Work, times: int) -> None:
        """However often the caller is cancelled, the work ends, then the cancellation goes on."""
        caller = asyncio.create_task(run_to_end(work(), seconds=5))
        await work.started.wait()
        for _ in range(times):
            caller.cancel()
            await give_way()

        assert not caller.done()
        work.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert work.is_done
        assert not work.was_cancelled

    async def test_cancelled_before_the_work_began(self, work: Work) -> None:
        """A cancellation that waits already does not keep the work from being done."""
        work.may_end.set()

        async def cancelled_caller() -> str:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return await run_to_end(work(), seconds=5)

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(cancelled_caller())
        assert work.is_done

    async def test_cancelled_while_the_work_ends(self, work: Work) -> None:
        """A cancellation in the very step in which the work ends is not swallowed."""
        caller = asyncio.create_task(run_to_end(work(), seconds=5))
        await work.started.wait()
        work.may_end.set()
        caller.cancel()

        with pytest.raises(asyncio.CancelledError):
            await caller
        assert work.is_done

    async def test_the_works_error_is_the_cause(self) -> None:
        """The cancellation wins over the error of the work, and carries it as its cause."""
        error = LookupError("no such row")
        work = Work(fails_with=error)
        caller = asyncio.create_task(run_to_end(work(), seconds=5))
        await work.started.wait()
        caller.cancel()
        work.may_end.set()

        with pytest.raises(asyncio.CancelledError) as caught:
            await caller
        assert caught.value.__cause__ is error

    async def test_the_work_is_bounded_in_time(self, work: Work) -> None:
        """Work that takes too long is cancelled, and TimeoutError tells so."""
        with pytest.raises(TimeoutError):
            await run_to_end(work(), seconds=0)
        assert not work.is_done

    async def test_it_is_bounded_though_the_caller_is_cancelled(self, work: Work) -> None:
        """Cancelled work that takes too long is given up, the time limit being the cause."""
        caller = asyncio.create_task(run_to_end(work(), seconds=0))
        await asyncio.sleep(0)
        caller.cancel()

        with pytest.raises(asyncio.CancelledError) as caught:
            await caller
        assert isinstance(caught.value.__cause__, TimeoutError)

    async def test_a_callers_time_limit_stays_a_time_limit(self, work: Work) -> None:
        """asyncio.timeout around it becomes TimeoutError, once the work is done."""
        reached = asyncio.Event()

        async def caller() -> None:
            async with asyncio.timeout(0):
                try:
                    await run_to_end(work(), seconds=5)
                finally:
                    reached.set()

        task = asyncio.create_task(caller())
        while not task.cancelling():  # noqa: ASYNC110 - the time limit has no event to wait for
            await asyncio.sleep(0)
        await give_way()
        assert not reached.is_set()
        work.may_end.set()

        with pytest.raises(TimeoutError):
            await task
        assert work.is_done
        assert task.cancelling() == 0

    async def test_a_task_group_around_it_ends(self, work: Work) -> None:
        """A failing sibling in a TaskGroup waits for the work, and its error arrives alone."""

        async def fail() -> None:
            await work.started.wait()
            asyncio.get_running_loop().call_soon(work.may_end.set)
            raise LookupError("sibling")

        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(run_to_end(work(), seconds=5))
                group.create_task(fail())
        assert work.is_done
        assert [type(each) for each in caught.value.exceptions] == [LookupError]

    async def test_work_that_never_began_is_closed(self, work: Work) -> None:
        """If even the inner task is cancelled before its first step, no coroutine is left over."""
        coroutine = work()
        before = asyncio.all_tasks()
        caller = asyncio.create_task(run_to_end(coroutine, seconds=5))
        await asyncio.sleep(0)  # the caller has made its task, which has not run yet
        for task in asyncio.all_tasks() - before:
            task.cancel()  # as asyncio.run does when it ends

        with pytest.raises(asyncio.CancelledError):
            await caller
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


class TestWaitThrough:
    async def test_without_tasks_it_returns_at_once(self) -> None:
        """There is nothing to wait for."""
        assert await wait_through([]) is None

    async def test_failures_are_left_in_the_tasks(self) -> None:
        """It waits for all tasks, failed or not, and raises none of their errors."""
        works = [Work(fails_with=LookupError()), Work()]
        tasks = [asyncio.create_task(work()) for work in works]
        for work in works:
            work.may_end.set()

        assert await wait_through(tasks) is None
        assert [type(task.exception()) for task in tasks] == [LookupError, type(None)]

    async def test_a_cancellation_is_returned_not_raised(self, work: Work) -> None:
        """The cancellation that arrived meanwhile is handed to the caller, its message too."""
        inner = asyncio.create_task(work())
        waiting = asyncio.create_task(wait_through([inner]))
        await work.started.wait()
        waiting.cancel("shutting down")
        await give_way()
        work.may_end.set()
        interrupted = await waiting

        assert interrupted is not None
        assert interrupted.args == ("shutting down",)
        assert inner.result() == "done"

    async def test_cancelled_tasks_have_ended_too(self, work: Work) -> None:
        """A task that somebody cancels counts as ended."""
        inner = asyncio.create_task(work())
        inner.cancel()

        assert await wait_through([inner]) is None
        assert inner.cancelled()


class TestRunInThread:
    async def test_the_caller_goes_on_in_its_own_thread(self) -> None:
        """The work has another thread and another event loop, and its result arrives."""

        async def work() -> tuple[int, asyncio.AbstractEventLoop]:
            return threading.get_ident(), asyncio.get_running_loop()

        thread, loop = await run_in_thread(work)

        assert thread != threading.get_ident()
        assert loop is not asyncio.get_running_loop()
        assert loop.is_closed()

    async def test_it_raises_what_the_work_raises(self) -> None:
        """The error of the work arrives."""
        work = Work(fails_with=LookupError("no such row"))
        work.may_end.set()
        with pytest.raises(LookupError, match="no such row"):
            await run_in_thread(work)

    async def test_a_cancellation_ends_the_work(self) -> None:
        """The work is cancelled, and has ended before the cancellation goes on."""
        has_begun = threading.Event()
        ended: list[str] = []

        async def work() -> None:
            has_begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append("cancelled")

        task = asyncio.create_task(run_in_thread(work))
        await asyncio.to_thread(has_begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert ended == ["cancelled"]

    async def test_a_cancellation_before_the_thread_has_begun(self) -> None:
        """A cancellation that comes before the work does ends it at its first `await`."""
        reached: list[str] = []

        async def work() -> None:
            reached.append("begun")
            await asyncio.sleep(0)
            reached.append("done")

        loop = asyncio.get_running_loop()
        gate = threading.Event()
        with ThreadPoolExecutor(max_workers=1) as threads:
            loop.set_default_executor(threads)
            threads.submit(gate.wait)
            task = asyncio.create_task(run_in_thread(work))
            await give_way()
            task.cancel()
            await give_way()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert reached == ["begun"]

    async def test_a_cancellation_that_comes_too_late_for_the_work(self) -> None:
        """Work that ends all the same does not swallow the cancellation."""
        has_begun, may_end = threading.Event(), threading.Event()

        async def work() -> None:
            has_begun.set()
            may_end.wait()  # as what computes: it sees no cancellation

        task = asyncio.create_task(run_in_thread(work))
        await asyncio.to_thread(has_begun.wait)
        task.cancel()
        await give_way()
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_an_executor_that_takes_nothing_more(self) -> None:
        """If there is no thread to be had, nothing is begun and the error says so."""
        threads = ThreadPoolExecutor(max_workers=1)
        asyncio.get_running_loop().set_default_executor(threads)
        threads.shutdown()
        work = Work()
        with pytest.raises(RuntimeError, match="shutdown"):
            await run_in_thread(work)

        assert not work.started.is_set()


class TestBackground:
    async def test_the_caller_does_not_wait(self, work: Work) -> None:
        """Work that is submitted goes on after the call, and is owned until it ended."""
        background = Background(limit=2)
        await background.submit(work.silently(), seconds=5)

        assert len(background) == 1
        assert not work.is_done
        work.may_end.set()
        await background.drain()
        assert work.is_done
        assert len(background) == 0

    async def test_beyond_the_limit_the_caller_waits(self) -> None:
        """With as many tasks as allowed under way, the next one is done before returning."""
        background = Background(limit=1)
        first, second = Work(), Work()
        await background.submit(first.silently(), seconds=5)
        submitting = asyncio.create_task(background.submit(second.silently(), seconds=5))
        await second.started.wait()

        assert not submitting.done()
        second.may_end.set()
        await submitting
        assert second.is_done
        first.may_end.set()
        await background.drain()

    async def test_draining_knows_of_callers_that_wait(self) -> None:
        """What a caller waits for, because the limit was reached, is drained too."""
        background = Background(limit=0)
        work = Work()
        submitting = asyncio.create_task(background.submit(work.silently(), seconds=5))
        await work.started.wait()
        draining = asyncio.create_task(background.drain())
        await give_way()

        assert not draining.done()
        work.may_end.set()
        await asyncio.gather(draining, submitting)

    async def test_a_cancelled_caller_beyond_the_limit_finishes_first(self) -> None:
        """Cancelling a caller that waits lets the work end, then the cancellation goes on."""
        background = Background(limit=0)
        work = Work()
        submitting = asyncio.create_task(background.submit(work.silently(), seconds=5))
        await work.started.wait()
        submitting.cancel()
        await give_way()
        work.may_end.set()

        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert work.is_done

    @pytest.mark.parametrize("limit", [0, 1])
    async def test_work_that_takes_too_long_is_given_up(
        self, work: Work, limit: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Work beyond its time limit is cancelled and logged, and never raises."""
        background = Background(limit=limit)
        await background.submit(work.silently(), seconds=0)
        await background.drain()

        assert not work.is_done
        assert "given up" in caplog.text

    @pytest.mark.parametrize("limit", [0, 1])
    async def test_failing_work_is_logged(
        self, limit: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error of background work goes to the log, and to nobody else."""
        background = Background(limit=limit)
        work = Work(fails_with=LookupError("no such row"))
        work.may_end.set()
        await background.submit(work.silently(), seconds=5)
        await background.drain()

        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "no such row" in caplog.text

    async def test_draining_takes_what_is_submitted_meanwhile(self) -> None:
        """Work that is submitted while draining is drained as well."""
        background = Background(limit=8)
        first, second = Work(), Work()

        async def submit_another() -> None:
            await first()
            await background.submit(second.silently(), seconds=5)
            second.may_end.set()

        await background.submit(submit_another(), seconds=5)
        first.may_end.set()
        await background.drain()

        assert second.is_done

    async def test_cancelling_a_drain_lets_everything_end(self) -> None:
        """A cancelled drain waits for all work, also what came later, before it raises."""
        background = Background(limit=8)
        first, second = Work(), Work()

        async def submit_another() -> None:
            await first()
            await background.submit(second.silently(), seconds=5)

        await background.submit(submit_another(), seconds=5)
        draining = asyncio.create_task(background.drain())
        await first.started.wait()
        draining.cancel()
        await give_way()
        first.may_end.set()
        await second.started.wait()
        await give_way()

        assert not draining.done()
        second.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await draining
        assert second.is_done

    async def test_work_that_never_began_is_closed(self, work: Work) -> None:
        """Background work that is cancelled before its first step leaves no coroutine over."""
        background = Background(limit=8)
        coroutine = work.silently()
        before = asyncio.all_tasks()
        await background.submit(coroutine, seconds=5)
        for task in asyncio.all_tasks() - before:
            task.cancel()
        await background.drain()

        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
