import os
import threading
import time

import pytest

from common.parallel import parallel_map


def negate_unevenly(item):
    time.sleep(0.002 * (item % 2 == 0))
    return -item


def test_results_come_in_order_and_only_a_few_are_computed_ahead():
    taken = []

    def items():
        for item in range(50):
            taken.append(item)
            yield item

    results = parallel_map(negate_unevenly, items(), prefetch=4)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) == 3 + 4
    assert list(results) == [-item for item in range(3, 50)]


@pytest.mark.parametrize("chunksize", [1, 4, 10, 99])
def test_chunks_change_nothing_about_the_results(chunksize):
    assert list(parallel_map(negate_unevenly, range(10), chunksize=chunksize)) == [-item for item in range(10)]
    assert list(parallel_map(negate_unevenly, [], chunksize=chunksize)) == []


def test_a_chunk_is_computed_by_one_thread():
    threads = list(parallel_map(lambda _: (time.sleep(0.001), threading.get_ident())[1], range(30), chunksize=10))
    assert [len(set(threads[start : start + 10])) for start in (0, 10, 20)] == [1, 1, 1]


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core, one thread")
def test_items_are_spread_over_several_threads():
    threads = set(parallel_map(lambda _: (time.sleep(0.01), threading.get_ident())[1], range(20)))
    assert 1 < len(threads) <= os.cpu_count()


def test_an_error_is_passed_on():
    results = parallel_map(lambda item: 1 / item, [2, 0, 4], prefetch=1)
    assert next(results) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_nobody_waits_for_any_more_is_not_computed():
    computed = []
    results = parallel_map(lambda item: (time.sleep(0.05), computed.append(item)), range(100), prefetch=90)
    next(results)
    results.close()
    assert len(computed) < 50
