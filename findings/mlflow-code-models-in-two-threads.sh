#!/usr/bin/env bash
# mlflow 3.17.2 with hypothesis 6.170.15: two threads that save a model from code leave a stand-in module behind.
#
# While MLflow runs the file of a "model from code" it puts a stand-in named dbutils into sys.modules and restores what
# was there before. Two threads that do so at once restore each other's: the stand-in stays for the life of the process.
# Its every attribute, __file__ too, is another stand-in, so whatever walks the loaded modules may fall over it, as
# Hypothesis does in the next test of that process that draws a value.
#
# Seen: "left behind: MockDbutils" and "TypeError: argument of type 'MockDbutils' is not iterable".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check mlflow==3.17.2 hypothesis==6.170.15
cat > model.py <<'PY'
import mlflow
from meeting import both

both()  # the first thread here waits for the second one


class Answer(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return ["yes" for _ in model_input]


mlflow.models.set_model(Answer())
PY
cat > meeting.py <<'PY'
import threading

order, arrived = threading.Barrier(2, timeout=60), threading.local()


def both():
    order.wait()
PY
cat > run.py <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor

import mlflow
from hypothesis import given, settings, strategies

with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda name: mlflow.pyfunc.save_model(name, python_model="model.py", pip_requirements=[]), "ab"))
print("left behind:", type(sys.modules["dbutils"]).__name__)


@settings(database=None)
@given(strategies.integers())
def test(number):
    assert number == number


try:
    test()
except TypeError as error:
    print("TypeError:", str(error).splitlines()[0])
PY
PYTHONPATH=. env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "left behind: MockDbutils" seen
grep -qx "TypeError: argument of type 'MockDbutils' is not iterable" seen
