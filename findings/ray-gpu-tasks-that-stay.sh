#!/usr/bin/env bash
# ray 2.60.0: num_gpus by .options() keeps a task's process, and what it holds on the GPU, after the task has ended.
#
# A function that is decorated with @ray.remote(num_gpus=...) runs in a process that ends with the task; the same
# function decorated plainly and called by .options(num_gpus=...) leaves its process idle, with all its memory, for the
# next task. Both ask the scheduler for the same thing. Logical GPUs show it, none has to be there.
#
# Seen: "decorator: processes left 0", "options: processes left 1".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check ray==2.60.0 psutil
cat > run.py <<'PY'
import os
import time

import psutil
import ray

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, logging_level="error")


@ray.remote(num_gpus=1)
def decorated():
    return os.getpid()


@ray.remote
def plain():
    return os.getpid()


def left(pids):
    time.sleep(5)
    return sum(psutil.pid_exists(pid) for pid in pids)


print("decorator: processes left", left({ray.get(decorated.remote()) for _ in range(2)}))
print("options: processes left", left({ray.get(plain.options(num_gpus=1).remote()) for _ in range(2)}))
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'SEEN'
decorator: processes left 0
options: processes left 1
SEEN
