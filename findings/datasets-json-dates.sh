#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 25.0.1: answers of a JSON file that all look like dates come back as datetimes.
#
# The JSON reader infers types with pyarrow, which takes a text column of dates for timestamps. One other answer among them
# leaves all of them text, so what a row holds depends on the rest of its file. `features` that say string are applied after
# that: they give text, but another one than the file has.
#
# Seen: "all dates: timestamp[s] 2020-01-01 00:00:00", "one that is none: string 2020-01-01" and
# "with features: string 2020-01-01 00:00:00".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==25.0.1
cat > run.py <<'PY'
import json

import datasets

datasets.disable_progress_bars()
TEXT = datasets.Features({"input": datasets.Value("string"), "output": datasets.Value("string")})
cases = {"all dates": ("2021-05-06", None), "one that is none": ("unknown", None), "with features": ("2021-05-06", TEXT)}
for name, (second, features) in cases.items():
    rows = [{"input": "when was it?", "output": answer} for answer in ("2020-01-01", second)]
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    read = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train", features=features, cache_dir=name)
    print(f"{name}: {read.features['output'].dtype} {read[0]['output']}")
PY
env/bin/python run.py 2>errors | tee seen || { cat errors; exit 1; }
grep -qx "all dates: timestamp\[s\] 2020-01-01 00:00:00" seen
grep -qx "one that is none: string 2020-01-01" seen
grep -qx "with features: string 2020-01-01 00:00:00" seen
