"""``fork_child.py MODE COUNT``: work in parallel, then children that do the same and compare: by
``fork``, by fork ``inside`` another thread's kernels, by a ``pool:METHOD`` of multiprocessing, or
as workers of torch's ``loader:METHOD``. Each answer has a process of its own. Prints how many gave
the right answer in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np

import sparseattn as sa


def answer(_: int = 0) -> str:
    """Products, plans, rows and gradients, large enough that all threads take part."""
    from public_calls import digest

    sa.set_num_threads(3)
    q = np.random.default_rng(0).standard_normal((1, 4, 600, 32), np.float32)
    vjp = sa.attention_vjp(q, q, q, "topk:9+window:30", causal=True)
    model = sa.Model.from_pretrained()(np.arange(1, 20))
    return digest([vjp.out, *vjp.pullback(q)[:3], model])


IN_TIME = 10  # seconds


class Answers:
    """A data set whose samples are answers, each with the process that found it in time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[str, int]:
        begin = time.monotonic()
        found = answer(i)
        return (found if time.monotonic() - begin < IN_TIME else "late"), os.getpid()


def count_right(given: list[tuple[str, int]], want: str) -> int:
    assert len({process for _, process in given} | {os.getpid()}) == len(given) + 1
    return sum(found == want for found, _ in given)


def forked(want: str) -> bool:
    """Whether a forked child finds the answer in time."""
    child = os.fork()
    if child == 0:
        signal.alarm(IN_TIME)  # ends the child where it hangs
        os._exit(0 if answer() == want else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_fork(count: int) -> int:
    want = answer()
    return sum(forked(want) for _ in range(count))


def run_inside(count: int) -> int:
    want, done = answer(), threading.Event()
    q = np.random.default_rng(0).standard_normal((1, 8, 2000, 64), np.float32)
    began = threading.Event()

    def work() -> None:
        while not done.is_set():
            began.set()
            sa.attention(q, q, q)

    busy = threading.Thread(target=work)
    busy.start()
    began.wait()
    right = sum(forked(want) for _ in range(count))
    done.set()
    busy.join()
    return right * (answer() == want)


def run_pool(method: str, count: int) -> int:
    want, answers = answer(), Answers(count)
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        results = [pool.apply_async(answers.__getitem__, (i,)) for i in range(count)]
        return count_right([result.get(60) for result in results], want)


def run_loader(method: str, count: int) -> int:
    from torch.utils.data import DataLoader

    want, right = answer(), 0
    for first in range(0, count, 2):
        workers = min(2, count - first)
        loader = DataLoader(
            Answers(workers),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            timeout=60,
            multiprocessing_context=method,
        )
        right += count_right(list(loader), want)
    return right


def main(mode: str, count: int) -> None:
    if mode == "fork":
        right = run_fork(count)
    elif mode == "inside":
        right = run_inside(count)
    elif mode.startswith("loader:"):
        right = run_loader(mode.removeprefix("loader:"), count)
    else:
        right = run_pool(mode.removeprefix("pool:"), count)
    print(right)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
