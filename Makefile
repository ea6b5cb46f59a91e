# `make demo` and `make test` need python3 (3.11 or later) and nothing else: each makes .venv and
# installs into it what it needs, again when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
# -qq: what an index says in passing would hide the rest of the output.
INSTALL := -m pip install -qq

.PHONY: demo test test-all test-integrations test-peers peers-scripts test-oldest test-installed \
	release-check soak bench docs linkcheck format clean
.DELETE_ON_ERROR:

# One thread: the network is small, and two would mostly wait for each other.
demo: .venv/.demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py

# The last line printed is pytest's summary. One thread a worker, for the same reason. `test` leaves
# out what is marked as slow, and most cases of the large tables; `test-all` runs everything.
test-all: ALL := --all
test test-all: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ALL)

# With the real packages of hosts, trackers and optimizers, in an environment of their own, which is
# large; 30 minutes at most, the installation included. The time limit of a test is pytest's
# `timeout`. Warnings of theirs are not listed; those of lrprobe are errors. A few tests take minutes:
# a worker that is done takes over what waits behind them.
test-integrations: .venv-integrations/.done
	OMP_NUM_THREADS=1 .venv-integrations/bin/python -m pytest tests/integrations -n $(JOBS) --dist worksteal \
		--session-timeout=1200 --disable-warnings

# Other projects' own test suites, with a probe on every optimizer that they create; prints a table.
# Their releases are those of tests/peers/requirements.txt. Takes an hour.
test-peers: .venv-peers/.done
	.venv-peers/bin/python tests/peers/peers_run.py $(SUITES)

# The same with their longest training scripts.
peers-scripts: .venv-peers/.done
	.venv-peers/bin/python tests/peers/peers_scripts.py

# All but the documentation and the browser, which need more packages.
UNIT := tests lrprobe --ignore=tests/test_docs.py --ignore=tests/test_browser.py

# With the oldest release of every dependency that is declared.
test-oldest: .venv-oldest/.done
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(UNIT) -n $(JOBS) --all

# With the newest releases, and TORCH=2.9.* or another; always a new environment.
test-installed:
	$(PYTHON) -m venv --clear .venv-installed
	.venv-installed/bin/python $(INSTALL) --editable '.[unit]' 'torch$(if $(TORCH),==$(TORCH))'
	OMP_NUM_THREADS=1 .venv-installed/bin/python -m pytest $(UNIT) -n $(JOBS) --all

# Builds dist/, and installs wheel and sdist in an empty environment each, where they have to work.
release-check: .venv-release/.done
	rm -rf dist
	LRPROBE_DIST=dist .venv-release/bin/python -m pytest tests/integrations/test_packaging.py -v \
		--deselect tests/integrations/test_packaging.py::test_import_touches_no_optional_package
	.venv-release/bin/python -m twine check --strict dist/*

# What takes half an hour: 200 kills, 20,000 steps, 10,000 probes. -s shows what was measured.
soak: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/soak.py -s -v

# Ratios of one run; alone on the machine, or they are too large.
bench: .venv/.bench
	$(BIN)/python benchmarks/bench.py

docs: .venv/.dev
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs
	$(BIN)/python docs/check_site.py build/docs
	@echo "build/docs/index.html"

# The links that lead elsewhere; needs a network.
linkcheck: .venv/.dev
	$(BIN)/sphinx-build -b linkcheck docs build/linkcheck

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find lrprobe tests examples docs -name __pycache__ -prune -exec rm -rf {} +

# timm only for its optimizers, which need none of what it asks for (torchvision). DeepSpeed's own
# build looks for torch, so that it comes last and is not isolated; no extension of it is compiled.
.venv-integrations/.done: pyproject.toml constraints.txt constraints-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python $(INSTALL) --constraint constraints.txt \
		--constraint constraints-integrations.txt --editable '.[integrations,optimizers]' einops
	.venv-integrations/bin/python $(INSTALL) --no-deps \
		--constraint constraints-integrations.txt timm
	.venv-integrations/bin/python $(INSTALL) --constraint constraints.txt \
		--constraint constraints-integrations.txt setuptools wheel
	DS_BUILD_OPS=0 .venv-integrations/bin/python $(INSTALL) --no-build-isolation \
		--constraint constraints.txt --constraint constraints-integrations.txt deepspeed
	@touch $@

.venv-peers/.done: pyproject.toml constraints.txt constraints-integrations.txt tests/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python $(INSTALL) --constraint constraints.txt \
		--constraint constraints-integrations.txt --editable . --requirement tests/peers/requirements.txt
	@touch $@

.venv-oldest/.done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable '.[unit]'
	@touch $@

.venv-release/.done: pyproject.toml constraints.txt constraints-integrations.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python $(INSTALL) --constraint constraints.txt \
		--constraint constraints-integrations.txt build pytest pytest-timeout pytest-xdist twine
	@touch $@

.venv/.demo .venv/.dev .venv/.bench: .venv/.%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),.venv/.demo)
