#!/usr/bin/env bash
# mlflow 3.17.2: a run's data set cannot be named by its sha256: digests have at most 36 characters.
#
# Registry, artifacts and tags take 64 hex digits; the field that is called digest does not, neither on a database nor
# through a server, and the message comes when the input is logged, not when the data set is made.
#
# Seen: "made with 64 characters", then "INVALID_PARAMETER_VALUE … 'digest' … maximum length of 36", and 36 are taken.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check mlflow==3.17.2
cat > run.py <<'PY'
import hashlib

import mlflow
import pandas
from mlflow.exceptions import MlflowException

mlflow.set_tracking_uri("sqlite:///mlflow.db")
digest = hashlib.sha256(b"rows").hexdigest()
for kept in (64, 36):
    data = mlflow.data.from_pandas(pandas.DataFrame({"text": ["a"]}), digest=digest[:kept])
    print("made with", len(data.digest), "characters")
    with mlflow.start_run():
        try:
            mlflow.log_input(data)
            print("logged")
        except MlflowException as error:
            print(error.error_code, "36" in str(error), "digest" in str(error))
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
diff seen - <<'SEEN'
made with 64 characters
INVALID_PARAMETER_VALUE True True
made with 36 characters
logged
SEEN
