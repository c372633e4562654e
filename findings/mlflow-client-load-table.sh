#!/usr/bin/env bash
# mlflow 3.17.2: a client's load_table asks another server than the client's own.
#
# MlflowClient(uri).log_table writes to the client's server. Its load_table looks for the runs by the module's search,
# which asks the ambient tracking address (set_tracking_uri, MLFLOW_TRACKING_URI): with two servers in one process a table
# that has just been logged is not found, or one of another server with the same experiment id is read.
#
# Seen: "MlflowException: No runs found with the corresponding table artifact." and, with the ambient address the
# client's own, "fox".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check mlflow==3.17.2
cat > run.py <<'PY'
import mlflow

client = mlflow.MlflowClient("sqlite:///one.db")
experiment = client.create_experiment("tables", artifact_location="one")
run = client.create_run(experiment)
client.log_table(run.info.run_id, {"answer": ["fox"]}, "answers.json")
mlflow.set_tracking_uri("sqlite:///two.db")
try:
    print(client.load_table(experiment, "answers.json"))
except mlflow.MlflowException as error:
    print("MlflowException:", error.message)
mlflow.set_tracking_uri("sqlite:///one.db")
print(client.load_table(experiment, "answers.json")["answer"].item())
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "MlflowException: No runs found with the corresponding table artifact." seen
grep -qx "fox" seen
