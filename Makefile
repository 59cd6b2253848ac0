# make demo   the whole chain on this machine, CPU only, in minutes
# make test   all tests; those of Slurm where it is installed and we are root
# make check  linters, types, layers, shell scripts
# Each makes .venv and installs by itself; only Python 3.11+, make, git and a C compiler are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DRILLS := benchmarks/crash_drill.py benchmarks/synthesis_array.py
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST := $(RUN) TORCH_EXTENSIONS_DIR="$${TMPDIR:-/tmp}/ccmdist-test-extensions-$$$$" pytest

.PHONY: demo slurm-demo slurm-drill test check drill bench bench-gpu clean install

demo: install
	$(RUN) ccmdist demo --out runs/demo

# The demo as jobs on a real Slurm of four nodes, preempted and with a power cut. Needs root and the packages
# slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge.
slurm-demo: install
	$(RUN) ccmdist demo --slurm --out runs/slurm-demo

# Tests of one process share the cores; those that start ranks or a cluster have them to themselves, one after the other.
test: install
	$(TEST) --numprocesses auto --maxprocesses 8 tests/unit tests/property
	$(TEST) tests/distributed tests/slurm

check: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) sh -c 'shellcheck .ci/run $$(git ls-files "slurm/*.sh")'

# One run under 30 random faults must end like an undisturbed one; an array of which workers are killed must leave no
# gap; then the tests that take longer than a test may.
drill: install
	$(RUN) python benchmarks/crash_drill.py
	$(RUN) python benchmarks/synthesis_array.py
	$(RUN) pytest -m drill --ignore=tests/slurm

# All of tests/slurm: also time limits, clusters of other kinds, containers, nodes that fall silent.
slurm-drill: install
	$(RUN) pytest -m "slurm or drill" tests/slurm

# Speed, memory and exactness on a CPU, each claim against what others do; those of a GPU are benchmarks/gpu/*.py.
bench: install
	$(RUN) sh -c 'for script in $(filter-out $(DRILLS),$(sort $(wildcard benchmarks/*.py))); do python "$$script" || failed="$$failed $$script"; done; test -z "$$failed" || { echo "do not hold:$$failed"; exit 1; }'

# The 20.4 B model with random weights on one GPU, in 15 minutes; without a GPU two blocks of it on a CPU.
bench-gpu: install
	$(RUN) python benchmarks/gpu/run_all.py

clean:
	rm -rf $(VENV) build *.egg-info runs/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
