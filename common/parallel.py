"""Work spread over the cores."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from common.process import num_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], prefetch: int = 16, chunksize: int = 1
) -> Iterator[Result]:
    """`map` on one thread per core, in order, with bounded memory.

    A thread takes `chunksize` items at a time (more pays off where each takes well under a millisecond), and at most
    `prefetch` chunks are computed before they are needed. Threads, not processes: reading, hashing, Pillow's decoding
    and resizing, sorting and the network all release the interpreter's lock.
    """
    iterator = iter(items)
    chunks: Iterator[list[Item]] = iter(lambda: list(itertools.islice(iterator, chunksize)), [])
    first = list(itertools.islice(chunks, 2))
    if len(first) < 2:  # to start threads would take longer
        yield from (function(item) for chunk in first for item in chunk)
        return
    chunks = itertools.chain(first, chunks)
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(_num_threads()) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(lambda chunk: [function(item) for item in chunk], chunk))
                if len(pending) > prefetch:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@functools.cache
def _num_threads() -> int:
    return num_cores()
