# make env | test | run | lint | reference | backbone-smollm2 | clean, from a clean checkout with Python 3.11+ and nothing else.
# Another interpreter: make env PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SAPT := $(BIN)/sapt
PLACES :=
LATER := --task place --data pipelines/data/place.csv --definition 'Tell where this happened, in a single word.' \
	evaluation.batch_size=50 cluster.train_workers=0

.PHONY: env test run lint reference backbone-smollm2 clean

env: $(INSTALLED)

# Rebuilt from nothing when a pin changes, so that no package of an older set stays behind.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "env: installing the pinned packages into .venv (minutes, once)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "env: ready"

test: env
	@echo "test: what needs no server, two files at a time"
	@$(BIN)/python -m pytest -m "not integration" --numprocesses 2 --dist loadfile
	@echo "test: with Ray, MLflow and S3, two files at a time"
	@$(BIN)/python -m pytest -m integration --numprocesses 2 --dist loadfile --no-loadscope-reorder

# PLACES: store.uri and tracking.uri, if not below runs/.
run: env
	@echo "run: SAPT learns three generated tasks, one after another"
	@$(SAPT) learn --config quickstart $(PLACES)
	@echo "run: the pool becomes the champion"
	@$(SAPT) pool promote latest --inline --config quickstart $(PLACES)
	@echo "run: a fourth task comes later, as a file; the rows of the first three are not needed"
	@$(SAPT) extend --from models:/quickstart@champion $(LATER) $(PLACES)
	@echo "run: the gate: has a task lost by it?"
	@$(SAPT) pool promote latest --inline --config quickstart $(PLACES)
	@echo "run: the same with one LoRA that is trained on in sequence, for comparison"
	@$(SAPT) learn --config quickstart method.name=sequential tracking.model=quickstart-sequential $(PLACES)
	@$(SAPT) extend --from models:/quickstart-sequential@latest $(LATER) $(PLACES)

lint: env
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/deptry .

# What the config files may say, made of the models that read them.
reference: env
	@$(BIN)/sapt fields > docs/config.md
	@$(BIN)/sapt fields --schema experiment > pipelines/configs/schema.json
	@$(BIN)/sapt fields --schema comparison > pipelines/configs/comparisons/schema.json
	@$(BIN)/sapt fields --schema sweep > pipelines/configs/sweeps/schema.json

# A small real model, written outside the repository. FOLDER: where, if not below ~/.cache.
backbone-smollm2: env
	@$(BIN)/python pipelines/fetch_smollm2.py $(if $(FOLDER),--out $(FOLDER))

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find sapt_core cluster pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
