"""Admission as a state machine: limits hold and no slot is lost in any order of events."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantkit.serve.gateway.admission_policy import (
    MAX_RETRY_AFTER,
    PRIORITY_LEVELS,
    AdmissionPolicy,
)
from quantkit.serve.gateway.admission_queue import AdmissionQueue, QueueFull

RUNNING, WAITING, AGING = 3, 5, 4.0


class Machine(RuleBasedStateMachine):
    """The policy, and a model of it with plain sorted lists."""

    def __init__(self) -> None:
        super().__init__()
        self.real = AdmissionPolicy(max_running=RUNNING, max_waiting=WAITING, aging=AGING)
        self.now, self.numbers = 0.0, count()
        self.running: list[int] = []
        self.waiting: dict[int, tuple[float, int]] = {}  # request -> (rank, request)
        self.who: dict[int, str] = {}

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        priority=st.integers(0, PRIORITY_LEVELS - 1),
        who=st.sampled_from("ab"),
        most=st.sampled_from([0, 0, 4]),
    )
    def arrive(self, priority: int, who: str, most: int) -> None:
        request = next(self.numbers)
        mine = Counter(self.who.values())[who]
        offer = self.real.offer(request, priority, who, self.now, max_requests=most)
        rank = (self.now + priority * AGING, request)
        if most and mine >= most:
            assert offer.outcome == "over"
            return
        if len(self.running) < RUNNING:
            assert (offer.outcome, offer.displaced) == ("run", None)
            self.running.append(request)
        elif len(self.waiting) < WAITING:
            assert (offer.outcome, offer.displaced) == ("wait", None)
            self.waiting[request] = rank
        else:
            last = max(self.waiting, key=self.waiting.__getitem__)
            if rank > self.waiting[last]:
                assert offer.outcome == "full"
                return
            assert (offer.outcome, offer.displaced) == ("wait", last)
            del self.waiting[last], self.who[last]
            self.waiting[request] = rank
        self.who[request] = who

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        following = self.real.release(request, self.now)
        self.running.remove(request)
        del self.who[request]
        if not self.waiting:
            assert following is None
            return
        first = min(self.waiting, key=self.waiting.__getitem__)
        assert following == first
        del self.waiting[first]
        self.running.append(first)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.real.release(request, self.now) is None
        del self.waiting[request], self.who[request]

    @rule()
    def release_twice_or_unknown(self) -> None:
        assert self.real.release(-1, self.now) is None

    @invariant()
    def policy_matches_model_and_limits_hold(self) -> None:
        assert set(self.real.running) == set(self.running)
        assert [request for _, request in self.real.waiting] == sorted(
            self.waiting, key=self.waiting.__getitem__
        )
        assert len(self.running) <= RUNNING and len(self.waiting) <= WAITING
        assert (
            not self.waiting or len(self.running) == RUNNING
        )  # no request waits while a slot is free
        assert 1 <= self.real.retry_after() <= MAX_RETRY_AFTER


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(0, PRIORITY_LEVELS - 1)), min_size=2, max_size=30
    )
)
def test_policy_prevents_starvation_and_orders_by_priority(
    arrivals: list[tuple[float, int]],
) -> None:
    """One request runs while the others are queued; then they run one by one."""
    real = AdmissionPolicy(max_running=1, max_waiting=len(arrivals), aging=AGING)
    real.offer(-1, 0, "", 0.0)
    arrivals.sort(key=lambda one: one[0])
    for request, (at, priority) in enumerate(arrivals):
        assert real.offer(request, priority, "", at).outcome == "wait"
    served, current = [], -1
    while (following := real.release(current, 200.0)) is not None:
        served.append(current := following)
    assert sorted(served) == list(range(len(arrivals)))
    for place, early in enumerate(served):
        for late in served[place + 1 :]:  # `early` was served before `late`
            (early_at, early_level), (late_at, late_level) = arrivals[early], arrivals[late]
            assert early_at <= late_at + late_level * AGING  # the bound on being passed
            if abs(early_at - late_at) < AGING * 0.999 and early_level != late_level:
                assert early_level < late_level


# ------------------------------------------------------------------------------------------ asyncio


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, PRIORITY_LEVELS - 1), st.integers(0, 6), st.integers(0, 6)),
        min_size=1,
        max_size=25,
    )
)
def test_queue_loses_no_slot_under_cancellation(plan: list[tuple[int, int, int]]) -> None:
    """Clients are cancelled while they wait, when they get a slot, and while they work."""

    async def scenario() -> None:
        queue, at_once, most = (
            AdmissionQueue(AdmissionPolicy(max_running=2, max_waiting=6, aging=AGING)),
            0,
            0,
        )

        async def one(priority: int, steps: int) -> str:
            nonlocal at_once, most
            try:
                number = await queue.acquire(priority, "", timeout=30)
            except QueueFull as busy:
                return busy.reason
            at_once += 1
            most = max(most, at_once)
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
            finally:
                at_once -= 1
                queue.release(number)
            return "done"

        async def cancelled(task: asyncio.Task[str], after: int) -> None:
            for _ in range(after):
                await asyncio.sleep(0)
            if after != 6:  # some live
                task.cancel()

        tasks = [asyncio.create_task(one(priority, steps)) for priority, steps, _ in plan]
        cancels = [
            asyncio.create_task(cancelled(task, after))
            for task, (_, _, after) in zip(tasks, plan, strict=True)
        ]
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        await asyncio.gather(*cancels)
        assert most <= 2
        assert all(
            one in ("done", "full", "displaced") or isinstance(one, asyncio.CancelledError)
            for one in ended
        )
        assert not queue.policy.running and not queue.policy.waiting and not queue._waiting

    asyncio.run(scenario())


def test_timeout_in_the_queue_reports_reason_and_retry_after() -> None:
    async def scenario() -> None:
        queue = AdmissionQueue(AdmissionPolicy(max_running=1, max_waiting=5, aging=AGING))
        first = await queue.acquire(0, "", timeout=1)
        with pytest.raises(QueueFull, match=r"timed out in the queue; retry after \d+ s") as caught:
            await queue.acquire(0, "", timeout=0.01)
        assert caught.value.retry_after >= 1
        assert not queue.policy.waiting
        queue.release(first)
        queue.release(first)
        assert not queue.policy.running

    asyncio.run(scenario())


def test_key_limits_its_concurrent_requests() -> None:
    async def scenario() -> None:
        queue = AdmissionQueue(AdmissionPolicy(max_running=3, max_waiting=5, aging=AGING))
        mine = [await queue.acquire(0, "a", timeout=1, max_requests=2) for _ in range(2)]
        with pytest.raises(QueueFull, match="this key has too many concurrent requests"):
            await queue.acquire(0, "a", timeout=1, max_requests=2)
        other = await queue.acquire(0, "b", timeout=1, max_requests=2)
        queue.release(mine[0])
        queue.release(await queue.acquire(0, "a", timeout=1, max_requests=2))
        queue.release(other)

    asyncio.run(scenario())


def test_full_queue_displaces_the_least_urgent_request() -> None:
    async def scenario() -> None:
        queue = AdmissionQueue(AdmissionPolicy(max_running=1, max_waiting=1, aging=AGING))
        first = await queue.acquire(5, "", timeout=1)
        idle = asyncio.create_task(queue.acquire(9, "", timeout=5))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="the queue is full"):
            await queue.acquire(9, "", timeout=5)
        urgent = asyncio.create_task(queue.acquire(0, "", timeout=5))
        with pytest.raises(QueueFull, match="a more urgent request took this place"):
            await idle
        queue.release(first)
        queue.release(await urgent)
        assert not queue.policy.running

    asyncio.run(scenario())
