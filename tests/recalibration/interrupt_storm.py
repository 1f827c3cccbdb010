"""Real signals at random instants of short runs: ``python interrupt_storm.py 10000`` sends that many, and counts.

Another process sends them, at random times of the length of a few runs, so that they come before, in and after every
step of a run; a run that has been hit is over, and the next begins. A model that is neither as before nor done is
counted as changed, and the exit status is 1.
"""

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from precisebn import update_bn_stats
from precisebn.models.snapshot import Snapshot

SENDER = """
import os, random, sys, time
target, number, longest = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
for _ in range(number):
    time.sleep(random.random() * longest)
    try:
        os.kill(target, 2)
    except ProcessLookupError:
        break
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4).eval(),
    )


def main(number: int) -> int:
    """Send, count, and print what came of it."""
    torch.set_num_threads(1)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    net, done = model(), model()
    update_bn_stats(done, batches, 2)
    start = time.perf_counter()
    for _ in range(20):
        update_bn_stats(model(), batches, 2)
    length = (time.perf_counter() - start) / 20
    before = Snapshot(net)
    goal: dict[str, Tensor] = {key: value.clone() for key, value in done.state_dict().items()}

    caught, runs, changed, finished = 0, 0, 0, 0
    handler = signal.getsignal(signal.SIGINT)
    received = 0

    def count(signum: int, frame: Any) -> None:
        nonlocal received, working
        received += 1
        if working:
            working = False  # and no other comes before the first is caught
            raise KeyboardInterrupt

    working = False
    signal.signal(signal.SIGINT, count)
    sender = subprocess.Popen([sys.executable, "-c", SENDER, str(os.getpid()), str(number), str(3 * length)])
    while sender.poll() is None:
        runs += 1
        try:
            working = True
            update_bn_stats(net, batches, 2)
            working = False
        except KeyboardInterrupt:
            caught += 1
        if Snapshot(net) == before:
            continue
        if all(torch.equal(value, goal[key]) for key, value in net.state_dict().items()):
            finished += 1
        else:
            changed += 1
        before.put_back()
    signal.signal(signal.SIGINT, handler)
    print(
        f"{received} signals of {number} sent, {caught} of {runs} runs of {length * 1e3:.1f} ms interrupted, "
        f"{finished} done, {changed} changed"
    )
    return 1 if changed else 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
