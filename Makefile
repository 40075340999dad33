PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help setup demo test check format golden

help: ## say what there is to make
	@sed -n 's/^\([a-z]*\): .*## /  make \1 \t/p' Makefile | expand -t 16

setup:   ## make .venv with everything in it (repeatable)
	@$(PYTHON) tools/setup/setup.py

demo: setup ## train a VAE-GAN on real data on two processes, in less than 10 minutes
	@.venv/bin/python -m tools.demo

test: setup ## run the tests; `make test ARGS="-m slow"` runs the slow ones
	@.venv/bin/python -m pytest $(ARGS)

check: setup ## lint, format and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

format: setup ## mend what ruff can mend
	@.venv/bin/ruff check --fix . ; .venv/bin/ruff format .

golden: setup ## write the golden losses anew, after a change that is meant to change them
	@.venv/bin/python -m tools.golden
