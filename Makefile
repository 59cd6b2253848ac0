# make demo   the whole chain on this machine, CPU only, in minutes
# make test   all tests
# make check  linters, types, layers, shell scripts
# Each makes .venv and installs by itself; only Python 3.11+, make, git and a C compiler are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test check drill bench clean install

demo: install
	$(RUN) ccmdist demo --out runs/demo

test: install
	$(RUN) TORCH_EXTENSIONS_DIR="$${TMPDIR:-/tmp}/ccmdist-test-extensions-$$$$" pytest

check: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) sh -c 'shellcheck .ci/run $$(git ls-files "slurm/*.sh")'

# One run under 30 random faults must end like an undisturbed one; then the tests that take longer than a test may.
drill: install
	$(RUN) python benchmarks/crash_drill.py
	$(RUN) pytest -m drill --ignore=tests/slurm

bench: install
	$(RUN) sh -c 'for script in $(filter-out benchmarks/crash_drill.py,$(sort $(wildcard benchmarks/*.py))); do python "$$script" || exit 1; done'

clean:
	rm -rf $(VENV) build *.egg-info runs/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
