"""``fork_child.py MODE COUNT``: work in parallel, then children that do the same and compare: by
``fork``, by fork ``inside`` another thread's kernels, by a ``pool:METHOD`` of multiprocessing, or
as workers of torch's ``loader``. Prints how many gave the right answer in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

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


def forked(want: str) -> bool:
    """Whether a forked child finds the answer in ten seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends the child where it hangs
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
    want = answer()
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(answer, (i,)) for i in range(count)]
        return sum(result.get(60) == want for result in results)


def run_loader(count: int) -> int:
    from torch.utils.data import DataLoader

    class Answers:
        def __len__(self) -> int:
            return count

        def __getitem__(self, i: int) -> str:
            return answer(i)

    want = answer()
    loader = DataLoader(Answers(), batch_size=1, num_workers=2, timeout=60)
    return sum(given == want for (given,) in loader)


def main(mode: str, count: int) -> None:
    if mode == "fork":
        right = run_fork(count)
    elif mode == "inside":
        right = run_inside(count)
    elif mode == "loader":
        right = run_loader(count)
    else:
        right = run_pool(mode.removeprefix("pool:"), count)
    print(right)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
