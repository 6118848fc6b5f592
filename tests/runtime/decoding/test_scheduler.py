"""The laws of the scheduler, over random sequences of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from medusa_runtime.decoding.scheduler import Job, Scheduler
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.errors import QueueFullError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.tuning import SHORTEST_COPY

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def make_job(prompt: list[int], priority: int = 0, max_new_tokens: int = 8) -> Job:
    sequence = TokenSequence(prompt, max_new_tokens, frozenset(), None)
    return Job(sequence, RequestHandle(sequence.stats, lambda _: None), priority)


class Laws(RuleBasedStateMachine):
    """The model of a backend: per row, the tokens whose entries its cache holds."""

    @initialize(rows=st.integers(1, 4), max_queue=st.integers(0, 4))
    def start(self, rows: int, max_queue: int) -> None:
        self.scheduler = Scheduler(rows, max_queue)
        self.caches: list[list[int]] = [[] for _ in range(rows)]
        self.alive: list[Job] = []
        self.chunks: dict[Job, int] = {}

    @rule(prompt=PROMPTS, priority=st.integers(-1, 1), base=st.integers(0, 3))
    def add(self, prompt: list[int], priority: int, base: int) -> None:
        shared = self.caches[base % len(self.caches)]
        job = make_job([*shared[:50], *prompt], priority)
        room = self.scheduler.max_queue + self.scheduler.rows - len(self.scheduler.running)
        if len(self.scheduler.waiting) >= room:
            with pytest.raises(QueueFullError):
                self.scheduler.add(job)
        else:
            self.scheduler.add(job)
            self.alive.append(job)

    @rule()
    def admit(self) -> None:
        waiting = list(self.scheduler.waiting)
        lengths = [len(cache) for cache in self.caches]
        admitted = []
        for admission in self.scheduler.admit(lengths):
            job, row = admission.job, admission.job.row
            assert row is not None
            prompt = job.sequence.prompt_ids
            # The reused entries are those of a prefix of the prompt, never of the whole prompt.
            assert self.caches[admission.source][: admission.shared] == prompt[: admission.shared]
            assert len(self.caches[admission.source]) >= admission.shared
            assert admission.shared < len(prompt)
            assert admission.source == row or admission.shared >= SHORTEST_COPY
            self.caches[row] = list(prompt[: admission.shared])
            lengths[row] = admission.shared
            assert job.sequence.prefilled == job.sequence.stats.cached_tokens == admission.shared
            admitted.append(job)
        assert admitted == waiting[: len(admitted)]
        assert not self.scheduler.waiting or len(self.scheduler.running) == self.scheduler.rows

    @precondition(lambda self: self.scheduler.prefilling() is not None)
    @rule(size=st.integers(1, 20))
    def prefill(self, size: int) -> None:
        job = self.scheduler.prefilling()
        assert job is not None and job.row is not None
        most = max(other.priority for other in self.alive if other.sequence.is_prefilling and other.row is not None)
        assert job.priority == most
        chunk = job.sequence.next_chunk(size)
        assert 0 < len(chunk) <= size
        self.caches[job.row] += chunk
        job.sequence.prefilled += len(chunk)
        if not job.sequence.is_prefilling:
            self.emit(job, [1])

    @rule(count=st.integers(1, 3))
    def decode(self, count: int) -> None:
        for job in self.scheduler.decoding():
            assert job.row is not None
            assert self.caches[job.row] == [*job.sequence.prompt_ids, *job.sequence.token_ids][:-1]
            self.caches[job.row] += [job.sequence.token_ids[-1], *[2] * (count - 1)]
            self.emit(job, [2] * count)

    def emit(self, job: Job, tokens: list[int]) -> None:
        job.sequence.accept(tokens)
        if job.sequence.finish_reason is not None:
            self.end(job)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.alive)))

    def end(self, job: Job) -> None:
        row = job.row
        self.scheduler.remove(job, 0 if row is None else len(self.caches[row]))
        self.alive.remove(job)

    @rule()
    def evict(self) -> None:
        for row in self.scheduler.evict():
            assert row not in self.scheduler.running
            self.caches[row] = []

    @invariant()
    def each_request_is_in_one_place(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        running = list(scheduler.running.values())
        assert {*map(id, running), *map(id, scheduler.waiting)} == set(map(id, self.alive))
        assert len(running) + len(scheduler.waiting) == len(self.alive)
        assert all(scheduler.running[row].row == row for row in scheduler.running)
        assert all(job.row is None for job in scheduler.waiting)
        assert [job.priority for job in scheduler.waiting] == sorted(
            (job.priority for job in scheduler.waiting), reverse=True
        )
        assert scheduler.is_idle == (not self.alive)


TestLaws = Laws.TestCase
TestLaws.settings = settings(max_examples=150, stateful_step_count=40)


@given(st.lists(st.integers(1, 200), min_size=2, max_size=6), st.integers(1, 16))
def test_prompts_take_turns(lengths: list[int], size: int) -> None:
    scheduler = Scheduler(len(lengths), 0)
    jobs = [make_job([1] * length) for length in lengths]
    for job in jobs:
        scheduler.add(job)
    list(scheduler.admit([0] * len(jobs)))
    while (job := scheduler.prefilling()) is not None:
        job.sequence.prefilled += len(job.sequence.next_chunk(size))
        left = [other.sequence.prefilled for other in jobs if other.sequence.is_prefilling]
        assert not left or max(left) - min(left) <= size


def test_a_row_goes_to_the_request_that_continues_its_text() -> None:
    scheduler = Scheduler(2, 4)
    lengths = [0, 0]

    def run(prompt: list[int]) -> tuple[int, int, int]:
        job = make_job(prompt)
        scheduler.add(job)
        (admission,) = scheduler.admit(lengths)
        assert job.row is not None
        row = job.row
        lengths[row] = len(prompt)
        scheduler.remove(job, len(prompt))
        return row, admission.source, admission.shared

    first = run([1] * 30)
    assert first == (0, 0, 0)
    assert run([2] * 30) == (1, 1, 0)  # the empty row
    assert run([1] * 30 + [5]) == (0, 0, 30)  # continues its own row
    assert run([1] * 20 + [7] * 5) == (1, 0, 20)  # the shared entries are copied, and the other row keeps its own
    assert run([1] * 30 + [5, 6]) == (0, 0, 31)
