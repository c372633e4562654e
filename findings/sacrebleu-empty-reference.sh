#!/usr/bin/env bash
# sacrebleu 2.6.0: a missing reference given as an empty string takes the brevity penalty away; given as None it does not.
#
# The README offers both for segments that have fewer references than others. BLEU drops None, but keeps the empty string as a
# reference of length 0. That is nearer in length to a short answer than the real one is, so the reference length of the corpus
# falls, and answers that are much too short are no longer punished. chrF gives the same figure either way.
#
# Seen: "one reference: BLEU 45.97 chrF 39.70", the same with None, and "BLEU 83.76 chrF 39.70" with "".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv env
env/bin/pip install -q --disable-pip-version-check sacrebleu==2.6.0
cat > run.py <<'PY'
from sacrebleu.metrics import BLEU, CHRF

answers = ["the cat sat on the mat today", "a dog ran"]
references = ["the cat sat on the mat this morning and slept", "a dog ran home quickly yesterday"]
for name, more in (("one reference", []), ("None", [[None, None]]), ("empty string", [["", ""]])):
    given = [references, *more]
    figures = (metric.corpus_score(answers, given).score for metric in (BLEU(), CHRF()))
    print(f"{name}: BLEU {next(figures):.2f} chrF {next(figures):.2f}")
PY
env/bin/python run.py | tee seen
grep -qx "one reference: BLEU 45.97 chrF 39.70" seen
grep -qx "None: BLEU 45.97 chrF 39.70" seen
grep -qx "empty string: BLEU 83.76 chrF 39.70" seen
