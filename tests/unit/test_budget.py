"""A shared amount: first come, first served, and nothing of it is ever lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aioblobcol._tasks import Budget


async def give_way() -> None:
    """Let every task that can run have its turn."""
    for _ in range(5):
        await asyncio.sleep(0)


def waiting(budget: Budget, *amounts: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(budget.acquire(amount)) for amount in amounts]


class TestOrder:
    async def test_what_is_left_is_given_at_once(self) -> None:
        """Nobody waits who need not."""
        budget = Budget(10)

        assert [await budget.acquire(4), await budget.acquire(6)] == [4, 6]
        assert budget.used == 10

    async def test_first_come_first_served(self) -> None:
        """A large demand is not overtaken by small ones that would fit."""
        budget = Budget(10)
        await budget.acquire(6)
        large, small = waiting(budget, 8, 1)
        await give_way()
        assert (large.done(), small.done(), budget.used) == (False, False, 6)

        budget.release(6)
        await give_way()
        assert (large.done(), small.done(), budget.used) == (True, True, 9)

    async def test_as_many_as_fit(self) -> None:
        """One release may serve several."""
        budget = Budget(10)
        await budget.acquire(10)
        tasks = waiting(budget, 3, 3, 3, 3)
        await give_way()
        budget.release(10)
        await give_way()

        assert [task.done() for task in tasks] == [True, True, True, False]
        budget.release(3)
        assert await tasks[-1] == 3

    async def test_what_is_given_back_in_parts(self) -> None:
        """Part of an amount serves whoever it suffices for."""
        budget = Budget(10)
        await budget.acquire(10)
        (task,) = waiting(budget, 4)
        await give_way()
        budget.release(3)
        await give_way()
        assert not task.done()
        budget.release(1)

        assert await task == 4

    async def test_more_than_the_whole(self) -> None:
        """A demand beyond the whole is granted the whole, alone."""
        budget = Budget(10)
        await budget.acquire(1)
        (task,) = waiting(budget, 1000)
        await give_way()
        assert not task.done()
        budget.release(1)

        assert await task == 10
        assert budget.used == 10

    async def test_nothing(self) -> None:
        """Nothing is granted, but not before those that came earlier."""
        budget = Budget(10)
        assert await budget.acquire(0) == 0
        await budget.acquire(10)
        first, nothing = waiting(budget, 1, 0)
        await give_way()
        assert not nothing.done()
        budget.release(10)

        assert list(await asyncio.gather(first, nothing)) == [1, 0]


class TestCancellation:
    async def test_of_one_that_waits(self) -> None:
        """Those behind it move up."""
        budget = Budget(10)
        await budget.acquire(6)
        large, small = waiting(budget, 8, 4)
        await give_way()
        large.cancel()
        await give_way()

        assert large.cancelled()
        assert await small == 4
        assert budget.used == 10

    async def test_of_one_that_has_been_granted(self) -> None:
        """What was granted in the same moment is given to the next."""
        budget = Budget(10)
        await budget.acquire(10)
        first, second = waiting(budget, 10, 10)
        await give_way()
        budget.release(10)
        first.cancel()  # its turn has come, and it has not run since
        await give_way()

        assert first.cancelled()
        assert await second == 10
        assert budget.used == 10

    async def test_before_a_release_in_the_same_moment(self) -> None:
        """One that is cancelled already gets nothing."""
        budget = Budget(10)
        await budget.acquire(10)
        first, second = waiting(budget, 10, 10)
        await give_way()
        first.cancel()
        budget.release(10)
        await give_way()

        assert first.cancelled()
        assert await second == 10
        assert budget.used == 10

    async def test_before_it_runs(self) -> None:
        """One that never ran has taken nothing."""
        budget = Budget(10)
        (task,) = waiting(budget, 4)
        task.cancel()
        await give_way()

        assert budget.used == 0

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    async def test_of_all(self, order: tuple[int, int]) -> None:
        """Nothing is left over, and the next one is served."""
        budget = Budget(10)
        await budget.acquire(10)
        tasks = waiting(budget, 5, 5)
        await give_way()
        for place in order:
            tasks[place].cancel()
        budget.release(10)
        await give_way()

        assert budget.used == 0
        assert await budget.acquire(10) == 10


class BudgetMachine(RuleBasedStateMachine):
    """Any order of demands, cancellations and releases, several of them within one moment."""

    LIMIT = 10

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.budget = Budget(self.LIMIT)
        self.tasks: list[asyncio.Task[int]] = []
        self.demands: dict[asyncio.Task[int], int] = {}
        self.granted: list[int] = []

    def _run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def _settle(self) -> None:
        self._run(give_way())
        for task in [each for each in self.tasks if each.done()]:
            self.tasks.remove(task)
            if not task.cancelled():
                self.granted.append(task.result())

    @rule(amounts=st.lists(st.integers(0, 15), min_size=1, max_size=3), pause=st.booleans())
    def acquire(self, amounts: list[int], pause: bool) -> None:
        for amount in amounts:
            task = self.loop.create_task(self.budget.acquire(amount))
            self.tasks.append(task)
            self.demands[task] = min(amount, self.LIMIT)
        if pause:
            self._settle()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), pause=st.booleans())
    def cancel(self, data: st.DataObject, pause: bool) -> None:
        data.draw(st.sampled_from(self.tasks)).cancel()
        if pause:
            self._settle()

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), pause=st.booleans())
    def release(self, data: st.DataObject, pause: bool) -> None:
        place = data.draw(st.integers(0, len(self.granted) - 1))
        self.budget.release(self.granted.pop(place))
        if pause:
            self._settle()

    @rule()
    def settle(self) -> None:
        """What is granted is what is used, and who waits is the first who does not fit."""
        self._settle()
        assert self.budget.used == sum(self.granted)
        if self.tasks:
            assert self.demands[self.tasks[0]] > self.LIMIT - self.budget.used

    @invariant()
    def no_more_than_there_is(self) -> None:
        assert 0 <= self.budget.used <= self.LIMIT

    def teardown(self) -> None:
        """When all is given back, all is there again."""
        self._settle()
        while self.granted or self.tasks:
            assert self.granted, "those who wait are never served"
            self.budget.release(self.granted.pop())
            self._settle()
        assert self.budget.used == 0
        self.loop.close()


TestAnyOrder = BudgetMachine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
