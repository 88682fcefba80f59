# Needs Python 3.11 or newer, pip, git and make. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := gradclip lightning_clip accelerate_clip tests examples benchmarks docs

.PHONY: setup demo test test-versions lint schema site pictures bench outcome kill clean

setup: .venv/ready

.venv/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup  ## Train a small GPT four times and compare: without clipping, fixed, auto, Accelerate.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=25

test-versions:  ## A part of the tests with old, middle and new versions; writes docs/versions.md. 15 GB.
	$(PYTHON) tests/versions.py

schema: setup  ## Write gradclip/presets/schema.json anew from the models.
	$(BIN)/gradclip schema --out gradclip/presets/schema.json

site: setup  ## Build the documents as a site, in site/; it opens from disk, without a server.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: setup  ## Draw docs/images anew: policies over one recorded run, a replay, a report (Chromium).
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/replay_picture.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python docs/report_picture.py

bench: setup  ## Time, operations, launches and memory against others; goes on where it was broken off.
	$(BIN)/python -m benchmarks.speed

outcome: setup  ## Final losses of every policy; goes on where it was broken off.
	$(BIN)/python -m benchmarks.outcome.run
	$(BIN)/python -m benchmarks.outcome.report

kill: setup  ## Kill a run 20 times at random moments and compare it with one that never died.
	PYTHONPATH=tests $(BIN)/python tests/faults/kill.py --kills 20

clean:
	rm -rf .venv demo site
