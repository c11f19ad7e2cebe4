# `make install`, then `make demo`. README.md says what the rest is for.

VENV := .venv
BIN := $(VENV)/bin
PRESET ?= gspo
WORKERS ?= 3

# An existing .venv keeps its Python unless PYTHON names another one. Each candidate is started, not only looked
# up: version managers put names on PATH that do not run.
ifndef PYTHON
PYTHON := $(shell for p in $(BIN)/python python3.11 python3.12 python3.13 python3; do \
	$$p -c '' 2>/dev/null && echo $$p && break; done)
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
FROZEN := requirements/cpu$(if $(filter 3.12 3.13,$(VERSION)),-py312).txt
NODEPS := requirements/cpu-nodeps.txt
GYM := requirements/gym.txt
TE_STUB := requirements/te-stub.txt
OLDER_TE_STUB := requirements/te-stub-before-2.13.txt
STAMP := $(VENV)/.installed-$(VERSION)
# uv installs in seconds what takes pip minutes; it reads its own settings, not pip's. `make install UV=` takes pip. To
# compile all packages would double pip's time (uv does not by default); what is used is compiled at the end.
UV ?= $(shell uv --version >/dev/null 2>&1 && echo uv)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip \
	--disable-pip-version-check install --quiet --no-compile)

# If this is set, as in many containers, every rank and test would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo study docs test test-fast test-all mutations lint format clean

install: $(STAMP)

# The stamp is written last, so an interrupted install is done again.
$(STAMP): $(FROZEN) $(NODEPS) $(GYM) $(TE_STUB) $(OLDER_TE_STUB) pyproject.toml setup.py
	@case '$(VERSION)' in 3.11|3.12|3.13) ;; *) \
		echo 'megatron_rl needs Python 3.11, 3.12 or 3.13; $(or $(PYTHON),python3) is $(or $(VERSION),missing).' >&2; \
		echo 'Install one and name it: make install PYTHON=python3.11' >&2; exit 1;; esac
	@$(BIN)/python -c 'import sys, pip; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
		|| $(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing $(FROZEN) into $(VENV) (Python $(VERSION)): about 1.7 GB, a few minutes'
	$(INSTALL) -r $(FROZEN)
	$(INSTALL) --no-deps -r $(NODEPS)
	@$(INSTALL) --no-deps -r $(GYM) 2>$(VENV)/gym.log || echo 'Not installed: reasoning-gym; see $(VENV)/gym.log'
	$(INSTALL) --no-deps --upgrade --target $(VENV)/te -r $(TE_STUB)
	$(INSTALL) --no-deps --upgrade --target $(VENV)/te-before-2.13 -r $(OLDER_TE_STUB)
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@echo 'Compiling what a trainer and a server import'
	@$(BIN)/python -c 'import megatron_rl.train, transformers.models.qwen3_moe.modeling_qwen3_moe'
	@TORCHDYNAMO_DISABLE=1 $(BIN)/python -m megatron_rl.rollout.sglang_cpu --help >/dev/null
	@touch $@

# Several processes share the cores; default OpenMP threads would slow each other a hundredfold.
demo study test test-fast test-all: export OMP_NUM_THREADS := 1

demo: install
	$(BIN)/megatron-rl demo --preset $(PRESET)

# The two small studies of examples/studies and a page about both, in .demo/studies/report.
study: install
	$(BIN)/megatron-rl demo --cold-start
	$(BIN)/python -m megatron_rl study examples/studies/gspo-clip-small.yaml
	$(BIN)/python -m megatron_rl study examples/studies/routing-share-small.yaml
	$(BIN)/python -m megatron_rl report .demo/studies/gspo-clip-small .demo/studies/routing-share-small \
		--out .demo/studies/report

# The site of the pages, in site/. Its packages have an environment of their own.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/docs.txt
	@touch $@

# Each worker has whole files; the short ones of tests/unit come last, so that all end at about the same time. Three keep
# two cores busy, as ranks often wait for each other. They can wait for ever: no test may take longer than `--timeout`.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) --timeout 300 -m "not slow and not gpu"

# Without processes, ranks, servers and runs. Nothing waits here, so two workers keep two cores busy.
test-fast: WORKERS := 2
test-fast: install
	$(PYTEST) --timeout 300 -m "not slow and not gpu" tests/unit

test-all: install
	$(PYTEST) --timeout 1800 --hypothesis-profile thorough

# Takes one guard after another out of a copy of the package; the tests that are listed with it must fail.
mutations: install
	$(BIN)/python tools/mutate.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Removes what these targets made, environments included. Runs (runs/, .demo/) stay.
clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
