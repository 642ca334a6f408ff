# Everything is installed in .venv; PYTHON selects the interpreter that creates it.
PYTHON ?= python3
BIN := .venv/bin

# As in the command line itself: torch's threads sleep while they wait, and free the cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Installing compiles nothing, but Python must keep what it compiles at the first import; otherwise
# each of the hundreds of test processes would compile torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo report test test-fast coverage lint format docs rulegraph lock audit

help:
	@echo "make demo   run the whole workflow on the built-in demo and print its metrics"
	@echo "make install  install everything into .venv; the other targets do this if needed"
	@echo "make report write results/report/report.html: the demo's tables and figures on one page"
	@echo "make test   run all tests (CDUL_TEST_DATA names the test data of docs/results.md)"
	@echo "make test-fast  run the tests that finish within minutes"
	@echo "make coverage  run all tests, and write a coverage report to build/coverage/index.html"
	@echo "make lint   check style and types of the code, and style of the workflow"
	@echo "make docs   regenerate config/README.md and the config's JSON schema"
	@echo "make rulegraph  redraw the README's picture of the rules"
	@echo "make lock   pin the dependencies of pyproject.toml again (needs uv)"
	@echo "make audit  check the pinned packages for known vulnerabilities (needs pip-audit)"

install: .venv/installed

# The version, which the installed package reports, is in cdul_steps/__init__.py.
.venv/installed: pyproject.toml requirements.lock cdul_steps/__init__.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile \
		-r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install
	$(BIN)/snakemake --cores all
	@$(BIN)/cdul summary results

report: install
	$(BIN)/snakemake --cores all report
	@echo "The report is results/report/report.html"

test: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# For use before each commit: without tests that are slow or start a browser or a cluster.
test-fast: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m "not slow and not browser and not slurm and not gpu and not root"

# Only a report: untested lines do not fail the build.
coverage: install
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered --cov-report=html:build/coverage

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

docs: install
	$(BIN)/cdul config-reference > config/README.md
	$(BIN)/cdul config-schema > workflow/schemas/config.schema.json

rulegraph: install
	$(BIN)/python tests/workflow/rulegraph.py

lock:
	uv pip compile --universal --python-version 3.11 --extra dev \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

# Strict: a package that cannot be looked up is also a failure.
audit:
	pip-audit --strict --no-deps --disable-pip --requirement requirements.lock
