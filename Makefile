# make demo: set up, then prepare, train and caption on the built-in data, offline
# make test: set up, then pass the tests
PYTHON ?= python3

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt .venv/demo
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test
demo: .venv/demo
	.venv/bin/python data/shapes/prepare.py
	.venv/bin/python train.py config/shapes.py --force
	.venv/bin/python data/shapes/exact_match.py

test: .venv/test
	.venv/bin/python -m pytest -q --durations=5
