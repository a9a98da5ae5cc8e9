"""Several blocks at a time: on a CPU, one thread per block scales better than many threads per operation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(work: Callable[[int], T], count: int) -> list[T]:
    """Call ``work(0)`` … ``work(count − 1)`` side by side, the operations of each on its share of torch's threads.

    Returns:
        What each call gave, in order.

    Raises:
        Exception: What a call has raised, once all have ended.
    """
    if count == 1:
        return [work(0)]
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(worker: int) -> T:
        # Holds for this thread, and for threads that meet torch for the first time while it does.
        torch.set_num_threads(max(1, threads // count))
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(worker)

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(alone, range(count)))
    finally:
        torch.set_num_threads(threads)
