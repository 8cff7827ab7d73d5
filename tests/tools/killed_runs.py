"""Runs the script again and again on the tiny video of a folder, each run killed at a random moment
or its disk full, until one ends by itself: python killed_runs.py FOLDER. A helper of
test_script.py."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY, check_whole, shrink, ts

for name, value in TINY.items():
    setattr(ts, name, value)
ts.ROOT = Path(sys.argv[1])
sys.argv[1:] = []
shrink(setattr)
moments = random.Random(3)
KINDS = [signal.SIGKILL, signal.SIGINT, "full disk"]
kills, status = 0, 1
while kills < 3 or status:
    kind = KINDS[kills] if kills < 3 else None
    room = int(10 ** moments.uniform(2, 6))
    seconds = moments.uniform(0.2, 2)
    child = os.fork()  # imports are done: every moment of the child's life is the script's work
    if not child:
        if kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            ts.run_as_script()
        except SystemExit as stop:
            print(stop.code, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + (seconds if kind and kind != "full disk" else 1e6)
    done = 0
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, kind)
        _, status = os.waitpid(child, 0)
    kills += 1 if kind else 0
    check_whole(ts.resolve_path(ts.OUTPUTS))
print("finished")
