# Needs Python ≥ 3.10 with venv, and make. Everything else is set up below this folder.
#
#   make demo                   the main job, on an embedded Redis: no server needed
#   make demo BROKER=amqp://…   the same on a real broker
#   make test                   all tests, on private brokers it starts itself, on the newest and the oldest Celery
#   make soak                   workers are killed, frozen and cut off for hours while every message is accounted for
#   make fuzz                   messages and letters that nobody should send, each accounted for
#   make check                  linters, types, import rules and pure tests, in under a minute
PYTHON ?= python3
VENV := .venv
OLDEST := .venvs/oldest
BIN := $(VENV)/bin
BROKER ?=

.PHONY: demo test check lint types imports unit integration oldest coverage soak fuzz bench schema clean
.DEFAULT_GOAL := check

# Without ensurepip (Debian's python3 lacks python3-venv) a venv has no pip: say what to install.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=python3.12 $@"; exit 1; }
	$(PYTHON) -m venv $(1) || { if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv $(1); \
	  else echo "venv is missing; install it (Debian: apt-get install python3-venv)"; exit 1; fi; }
endef

$(VENV)/.demo: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/pip install -q --disable-pip-version-check -e '.[demo,rich]'
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev,demo,rich]'
	@touch $@ $(VENV)/.demo

$(OLDEST)/.dev: pyproject.toml
	$(call make_venv,$(OLDEST))
	$(OLDEST)/bin/pip install -q --disable-pip-version-check 'celery==5.5.*' -e '.[dev,demo]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python -m celery_dlx.demo $(BROKER)

check: lint types imports unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests

# Three at a time, each with brokers of its own: most of the time is spent waiting for processes. A file stays together; the
# storms, which take longest, come first.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder

integration: $(VENV)/.dev
	$(BIN)/python -m pytest integration $(SIDE_BY_SIDE) --durations=15

# The matrix, the conformance suite, how Redis messages are taken and a storm on the oldest Celery we support.
oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest tests
	$(OLDEST)/bin/python -m pytest integration $(SIDE_BY_SIDE) -k "test_matrix or test_conformance or test_settings or test_redis_claims or in_a_storm"

test: unit integration oldest

# One after the other: both folders have a test_replay.py.
COVERED = COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml $(BIN)/python -m pytest --cov --cov-branch

coverage: $(VENV)/.dev
	$(BIN)/coverage erase
	$(COVERED) tests --cov-report=
	$(COVERED) integration $(SIDE_BY_SIDE) --cov-append --cov-report=
	$(BIN)/coverage report

# Hours: storms with seeds of their own; SOAK="--rounds 2 --only redis" for less.
soak: $(VENV)/.dev
	$(BIN)/python integration/faults/soak.py $(SOAK)

# Messages and letters that nobody should send; FUZZ="--messages 20000 --seed N --only redis".
fuzz: $(VENV)/.dev
	$(BIN)/python integration/faults/fuzz.py $(FUZZ)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

schema: $(VENV)/.dev
	$(BIN)/python -c "import json; from celery_dlx.policy.model import json_schema; print(json.dumps(json_schema(), indent=2))" > celery_dlx/policy/schema.json

clean:
	rm -rf $(VENV) .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
