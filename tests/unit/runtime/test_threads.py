"""Workers on one queue: every item once, the first failure wins, an interrupt is answered."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from vcelltools.runtime.threads import share_work


@pytest.mark.parametrize("n", [1, 3])
def test_every_item_is_done_once_and_a_worker_keeps_its_thread(n):
    seen, threads = [[] for _ in range(n)], [set() for _ in range(n)]

    def make_worker(k):
        def work(item):
            seen[k].append(item)
            threads[k].add(threading.get_ident())
            time.sleep(0.001)

        return work

    share_work(range(50), [make_worker(k) for k in range(n)])
    assert sorted(x for s in seen for x in s) == list(range(50))
    assert all(s == sorted(s) for s in seen)
    assert all(len(t) == 1 for t in threads if t)
    assert (threads[0] == {threading.get_ident()}) == (n == 1)


def test_of_several_failures_the_first_items_is_raised_and_the_rest_is_left():
    both = threading.Barrier(2)
    done = []

    def work(item):
        done.append(item)
        if item < 2:
            both.wait(10)
            raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        share_work(range(100), [work, work])
    assert sorted(done) == [0, 1]


def test_nothing_to_do_is_done():
    share_work([], [lambda item: pytest.fail(f"called with {item}")] * 2)


def test_an_interrupt_is_raised_while_the_workers_are_busy():
    go_on = threading.Event()
    began = threading.Event()

    def work(item):
        began.set()
        go_on.wait(30)

    def interrupt():
        began.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    killer = threading.Thread(target=interrupt)
    try:
        killer.start()
        with pytest.raises(KeyboardInterrupt):
            share_work(range(4), [work, work])
    finally:
        signal.signal(signal.SIGINT, before)
        go_on.set()
        killer.join()
