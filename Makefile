# `make quickstart` and `make test` set everything up in .venv, once, and again only when the requirements change.
PYTHON ?= python3

.PHONY: quickstart test docs

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/pip install --quiet --editable '.[test]'
	touch $@

quickstart: .venv/installed
	.venv/bin/vqzoo run recipes/quickstart.yaml

test: .venv/installed-test
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile

docs: .venv/installed
	.venv/bin/python docs/generate.py
