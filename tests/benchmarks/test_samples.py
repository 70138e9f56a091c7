"""Places that samples find: of threads that work, with their callers, and not of those that wait."""

import threading
import time

from benchmarks.shared.samples import sampled, shares


def busy_inside(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def caller_of_it(seconds):
    busy_inside(seconds)


def test_a_thread_that_works_is_found_with_its_callers_and_one_that_waits_is_not():
    ready = threading.Event()
    waiter = threading.Thread(target=ready.wait, name="waiter")
    worker = threading.Thread(target=caller_of_it, args=(0.4,))
    with sampled() as found:
        waiter.start()
        worker.start()
        worker.join()
        ready.set()
        waiter.join()
    seen = found.total()
    inside = sum(count for place, count in found.items() if "busy_inside < " in place and "caller_of_it" in place)
    assert inside > 5, found.most_common(5)
    assert not [place for place in found if place.startswith("threading.py")], "a thread that waits"
    time.sleep(0.02)
    assert found.total() == seen, "looked at after the block"
    top = shares(found, 1)
    assert len(top) == 1
    assert 0 < next(iter(top.values())) <= 1
    assert shares(found.__class__(), 3) == {}
