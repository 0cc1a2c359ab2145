"""Timers against the obvious implementation: a dict that is scanned."""

from hypothesis import given
from hypothesis import strategies as st

from scaler.timers import TimerKey, Timers

KEYS = [TimerKey("idle", name) for name in "abc"]
STEPS = st.lists(st.tuples(st.sampled_from(["arm", "disarm", "pass"]), st.sampled_from(KEYS), st.integers(0, 20)), max_size=60)


@given(STEPS)
def test_what_is_due_is_popped_once_and_never_early(steps) -> None:
    timers, model, now = Timers(), {}, 0
    for what, key, amount in steps:
        if what == "arm":
            timers.arm(key, now + amount)
            model[key] = now + amount
        elif what == "disarm":
            timers.disarm(key)
            model.pop(key, None)
        else:
            now += amount
            if model:
                assert timers.next_due_ns is not None
                assert timers.next_due_ns <= min(model.values())
            due = {key for key, at in model.items() if at <= now}
            popped = timers.pop_due(now)
            assert len(popped) == len(set(popped))
            assert set(popped) == due
            model = {key: at for key, at in model.items() if key not in due}


def test_moving_and_stopping_a_timer_does_not_grow_the_heap() -> None:
    timers, key = Timers(), KEYS[0]
    for now in range(10_000):
        timers.arm(key, now + 1_000_000)
        timers.disarm(key)
        timers.arm(key, now + 1_000_001)
    assert len(timers) == 1


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=60))
def test_cancelled_timers_are_not_due_and_the_others_keep_their_order(steps) -> None:
    kept, timers = Timers(), Timers()
    for number, (due, cancelled) in enumerate(steps):
        key = TimerKey("answer", str(number))
        timers.arm(key, due)
        if cancelled:
            timers.cancel(key)
        else:
            kept.arm(key, due)
    assert timers.pop_due(2500) == kept.pop_due(2500)
    assert timers.pop_due(5000) == kept.pop_due(5000)


def test_answers_that_come_in_time_do_not_grow_the_heap() -> None:
    timers, late = Timers(), TimerKey("answer", "late")
    timers.arm(late, 50_000)
    for now in range(10_000):
        key = TimerKey("answer", str(now))
        timers.arm(key, now + 60_000)
        timers.cancel(key)
    assert len(timers) < 3000
    assert timers.pop_due(100_000) == [late]
