#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 25.0.1: an empty data set is saved and cannot be loaded; it takes its whole dictionary along.
#
# save_to_disk writes no Arrow file for a data set without rows, and load_from_disk takes the first of none. A DatasetDict of
# which one split is empty (by select, or by a map after a filter; a filter alone keeps the rows on disk) is saved without a
# word, and none of its splits can be loaded by the folder any more.
#
# Seen: "saved: dataset_dict.json test train", "files of the empty split: dataset_info.json state.json",
# "loaded: IndexError list index out of range" and "the other split alone: 2 rows".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==25.0.1
cat > run.py <<'PY'
import os

import datasets

datasets.disable_progress_bars()
rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
parts = {"train": rows, "test": rows.filter(lambda row: len(row["text"]) > 5).map(lambda row: {"length": len(row["text"])})}
datasets.DatasetDict(parts).save_to_disk("saved")
print("saved:", *sorted(os.listdir("saved")))
print("files of the empty split:", *sorted(os.listdir("saved/test")))
try:
    print("loaded:", datasets.load_from_disk("saved"))
except Exception as error:
    print("loaded:", type(error).__name__, error)
print("the other split alone:", len(datasets.load_from_disk("saved/train")), "rows")
PY
env/bin/python run.py | tee seen
grep -qx "saved: dataset_dict.json test train" seen
grep -qx "files of the empty split: dataset_info.json state.json" seen
grep -qx "loaded: IndexError list index out of range" seen
grep -qx "the other split alone: 2 rows" seen
