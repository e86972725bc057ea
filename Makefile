# make demo: set up .venv, caption sample photos, draw scenes, train on some and caption the others
# make test: set up .venv, then run the tests
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
	.venv/bin/python sample.py --image assets/photos
	.venv/bin/python data/shapes/prepare.py
	.venv/bin/python train.py config/shapes.py --force
	.venv/bin/python data/shapes/exact_match.py

test: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --durations=5
