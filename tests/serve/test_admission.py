"""Admission as a state machine: limits hold and no slot is lost in any order of events."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

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
        self.turns: dict[int, int] = {}  # of running and waiting requests
        self.entered: list[int] = []

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    def count_turns(self, who: str) -> int:
        return sum(self.turns[request] for request, owner in self.who.items() if owner == who)

    def count_used(self) -> int:
        return sum(min(self.turns[request], RUNNING) for request in self.running)

    def fits(self, turns: int) -> bool:
        return self.count_used() + min(turns, RUNNING) <= RUNNING

    def start_waiting(self) -> list[int]:
        started = []
        while self.waiting:
            first = min(self.waiting, key=self.waiting.__getitem__)
            if not self.fits(self.turns[first]):
                break
            del self.waiting[first]
            self.running.append(first)
            started.append(first)
        return started

    def forget(self, request: int) -> None:
        del self.who[request], self.turns[request]

    @rule(who=st.sampled_from("ab"), most=st.sampled_from([0, 0, 4]))
    def enter(self, who: str, most: int) -> None:
        """The most urgent priority: rejected only if no body could help."""
        request = next(self.numbers)
        outcome = self.real.enter(request, 0, who, self.now, max_turns=most)
        if most and self.count_turns(who) >= most:
            assert outcome == "over"
            return
        last = max(self.waiting.values(), default=(0.0, 0))
        if self.count_used() >= RUNNING and len(self.waiting) >= WAITING and self.now >= last[0]:
            assert outcome in ("full", "entered") if self.now == last[0] else outcome == "full"
        else:
            assert outcome == "entered"
        if outcome == "entered":
            self.entered.append(request)
            self.who[request], self.turns[request] = who, 1

    @rule(
        priority=st.integers(0, PRIORITY_LEVELS - 1),
        who=st.sampled_from("ab"),
        most=st.sampled_from([0, 0, 4]),
        turns=st.sampled_from([1, 1, 1, 2, 3, 7]),
        data=st.data(),
    )
    def arrive(self, priority: int, who: str, most: int, turns: int, data: st.DataObject) -> None:
        request = next(self.numbers)
        if self.entered and data.draw(st.booleans()):
            request = self.entered.pop(data.draw(st.integers(0, len(self.entered) - 1)))
            who = self.who[request]
            self.forget(request)
        mine = self.count_turns(who)
        offer = self.real.offer(request, priority, who, self.now, turns=turns, max_turns=most)
        rank = (self.now + priority * AGING, request)
        if most and mine + turns > most:
            assert offer.outcome == "over"
            return
        if self.fits(turns) and rank < min(self.waiting.values(), default=(float("inf"), 0)):
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
            del self.waiting[last]
            self.forget(last)
            self.waiting[request] = rank
        self.who[request], self.turns[request] = who, turns

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        following = self.real.release(request, self.now)
        self.running.remove(request)
        self.forget(request)
        assert following == self.start_waiting()

    @precondition(lambda self: self.waiting or self.entered)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted([*self.waiting, *self.entered])))
        following = self.real.release(request, self.now)
        if request in self.entered:
            self.entered.remove(request)
        else:
            del self.waiting[request]
        self.forget(request)
        assert following == self.start_waiting()

    @rule()
    def release_twice_or_unknown(self) -> None:
        assert self.real.release(-1, self.now) == []

    @invariant()
    def policy_matches_model_and_limits_hold(self) -> None:
        assert set(self.real.running) == set(self.running)
        assert [request for _, request in self.real.waiting] == sorted(
            self.waiting, key=self.waiting.__getitem__
        )
        assert self.real.n_running == self.count_used() <= RUNNING and len(self.waiting) <= WAITING
        if self.waiting:  # the first one does not fit
            assert not self.fits(self.turns[min(self.waiting, key=self.waiting.__getitem__)])
        assert self.real._turns == self.turns and self.real._client == self.who
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
    while following := real.release(current, 200.0):
        served.append(current := following[0])
    assert sorted(served) == list(range(len(arrivals)))
    for place, early in enumerate(served):
        for late in served[place + 1 :]:  # `early` was served before `late`
            (early_at, early_level), (late_at, late_level) = arrivals[early], arrivals[late]
            assert early_at <= late_at + late_level * AGING  # the bound on being passed
            if abs(early_at - late_at) < AGING * 0.999 and early_level != late_level:
                assert early_level < late_level


# ------------------------------------------------------------------------------------------ asyncio


async def acquire(queue: AdmissionQueue, priority: int, client: str, **options: Any) -> int:
    """Enter and wait; return the slot."""
    slot = queue.enter(priority, client, max_turns=options.get("max_turns", 0))
    await queue.acquire(slot, priority, client, **options)
    return slot


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
                number = queue.enter(priority, "")
            except QueueFull as busy:
                return busy.reason
            try:
                await queue.acquire(number, priority, "", timeout=30, turns=1 + priority % 3)
            except QueueFull as busy:
                return busy.reason
            at_once += min(2, 1 + priority % 3)
            most = max(most, at_once)
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
            finally:
                at_once -= min(2, 1 + priority % 3)
                queue.release(number)
            return "done"

        async def cancel_after(task: asyncio.Task[str], after: int) -> None:
            for _ in range(after):
                await asyncio.sleep(0)
            if after != 6:  # some live
                task.cancel()

        tasks = [asyncio.create_task(one(priority, steps)) for priority, steps, _ in plan]
        cancels = [
            asyncio.create_task(cancel_after(task, after))
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
        first = await acquire(queue, 0, "", timeout=1)
        with pytest.raises(QueueFull, match=r"timed out in the queue; retry after \d+ s") as caught:
            await acquire(queue, 0, "", timeout=0.01)
        assert caught.value.retry_after >= 1
        assert not queue.policy.waiting
        queue.release(first)
        queue.release(first)
        assert not queue.policy.running

    asyncio.run(scenario())


def test_key_limits_its_concurrent_requests() -> None:
    async def scenario() -> None:
        queue = AdmissionQueue(AdmissionPolicy(max_running=3, max_waiting=5, aging=AGING))
        mine = [await acquire(queue, 0, "a", timeout=1, max_turns=2) for _ in range(2)]
        with pytest.raises(QueueFull, match="this key has too many concurrent requests"):
            await acquire(queue, 0, "a", timeout=1, max_turns=2)
        other = await acquire(queue, 0, "b", timeout=1, max_turns=2)
        queue.release(mine[0])
        queue.release(await acquire(queue, 0, "a", timeout=1, max_turns=2))
        queue.release(other)

    asyncio.run(scenario())


def test_full_queue_displaces_the_least_urgent_request() -> None:
    async def scenario() -> None:
        queue = AdmissionQueue(AdmissionPolicy(max_running=1, max_waiting=1, aging=AGING))
        first = await acquire(queue, 5, "", timeout=1)
        idle = asyncio.create_task(acquire(queue, 9, "", timeout=5))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="the queue is full"):
            await acquire(queue, 9, "", timeout=5)
        urgent = asyncio.create_task(acquire(queue, 0, "", timeout=5))
        with pytest.raises(QueueFull, match="a more urgent request took this place"):
            await idle
        queue.release(first)
        queue.release(await urgent)
        assert not queue.policy.running

    asyncio.run(scenario())
