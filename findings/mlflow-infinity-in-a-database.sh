#!/usr/bin/env bash
# mlflow 3.17.2: a metric that is infinite comes back from a database store as the largest finite float.
#
# NaN comes back as NaN and infinity does not come back as infinity: what was logged as a diverged loss reads as a
# number, which passes math.isfinite and is not found by a search for what is not finite. No warning is given.
#
# Seen: "inf -> 1.7976931348623157e+308", "-inf -> -1.7976931348623157e+308", "nan -> nan".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check mlflow==3.17.2
cat > run.py <<'PY'
from mlflow import MlflowClient

client = MlflowClient("sqlite:///mlflow.db")
run = client.create_run(client.create_experiment("losses")).info.run_id
for name in ("inf", "-inf", "nan"):
    client.log_metric(run, name.replace("-", "minus_"), float(name))
for name in ("inf", "-inf", "nan"):
    print(name, "->", client.get_run(run).data.metrics[name.replace("-", "minus_")])
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'SEEN'
inf -> 1.7976931348623157e+308
-inf -> -1.7976931348623157e+308
nan -> nan
SEEN
