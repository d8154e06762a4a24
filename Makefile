# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKERS ?= 2
OUT ?= demo-run
# Python of an environment with TRL, for `make bench`; none: TRL is left out
TRL ?=

.PHONY: demo demo-report test test-oldest test-newest lint format bench soak paper-table real-table served-test docs schemas clean

demo: .venv/.installed
	$(BIN)/ketchup-cache demo --out $(OUT)

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# all tests with the oldest, or the newest, versions that pyproject.toml allows; each has an environment of its own
test-oldest test-newest:
	test -x .venv-$@/bin/python || $(PYTHON) -m venv .venv-$@
	.venv-$@/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/$@.txt -e '.[dev]'
	.venv-$@/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python -m benchmarks.returns
	$(BIN)/python -m benchmarks.store --short
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.loading --short
	$(BIN)/python -m benchmarks.growth --short
	$(BIN)/python -m benchmarks.lab --short
	$(BIN)/python -m benchmarks.sweep --short
	$(BIN)/python -m benchmarks.live_teacher --short
	$(BIN)/python -m benchmarks.trl_live --short --trl-python "$(TRL)"
	$(BIN)/python -m benchmarks.micro_batches --short
	$(BIN)/python -m benchmarks.rollouts --short
	$(BIN)/python -m benchmarks.keep_top --short
	$(BIN)/python -m benchmarks.dev_set --short
	$(BIN)/python -m benchmarks.processes --short
	$(BIN)/python -m benchmarks.fsdp --short
	$(BIN)/python -m benchmarks.large_checkpoint --short
	$(BIN)/python -m benchmarks.gpu --short

# the report of the demo's runs as a page for the docs
demo-report: demo
	$(BIN)/ketchup-cache report $(OUT)/k1 $(OUT)/k4 $(OUT)/exact --student best --out docs/demo-report.html

# adds to the tally in benchmarks/results/soak.json and docs/trust.md; `make test` has a short form
MINUTES ?= 40
soak: .venv/.installed
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

# hours; stopped at any moment, it goes on
paper-table: .venv/.installed
	$(BIN)/python -m benchmarks.paper run

# ten minutes of many hours; run it again to go on. Two at once share the work. MULTI30K: folder with train, dev and test.jsonl
MULTI30K ?= multi30k
real-table: .venv/.installed
	$(BIN)/python -m benchmarks.real --data "$(MULTI30K)" --minutes 10

# a teacher behind a real vLLM on a CPU, which is installed into VLLM (3.5 GB); a quarter of an hour after that
VLLM ?= ../ketchup-served
served-test: .venv/.installed
	$(BIN)/python -m benchmarks.served --folder "$(VLLM)"
	$(BIN)/python -m benchmarks.engine --folder "$(VLLM)"

# the site, into site/
docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

schemas: .venv/.installed
	$(BIN)/python -m ketchup_cache.schemas.generate

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-test-* demo-run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
