# Everything from a fresh clone: `make pretrain` trains a model, `make check` checks a change in a
# minute, `make test` checks everything that this machine can run.
# Needs Python 3.11 and make. Set-up goes to .venv and is repeated only when a pin changes.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The newest transformers, before the packages of .venv: adapters, with which models are fine-tuned,
# holds it back there.
NEWER := .venv-transformers5
RUN_DIR ?= runs/quickstart
# Of pytest, for two cores: half of the time a test waits for its ranks, a signal or SLURM.
WORKERS ?= 3

.PHONY: help pretrain consortium check test test-all test-transformers5 slurm-packages slurm-up slurm-down lint format docs bench \
	bench-gpu bench-gpu-published clean .venv
.DELETE_ON_ERROR:

help:
	@echo "make pretrain  train the quick start into $(RUN_DIR); again: resume, or say that it is done;"
	@echo "               on the CPU, or with DS_ACCELERATOR=cuda on 4 GPUs"
	@echo "make consortium  three sites and a coordinator on this machine, into runs/consortium"
	@echo "make check     lint, types and the fast unit tests: before every commit"
	@echo "make test      lint, types and every test that this machine can run; as root installs SLURM"
	@echo "make test-all  the same with every case of the matrices of options, not a sample of them,"
	@echo "               and then make test-transformers5"
	@echo "make test-transformers5  pre-training, export and evaluation with the newest transformers 5.x"
	@echo "make lint      ruff and mypy only"
	@echo "make format    rewrite the code as ruff formats it"
	@echo "make docs      the documentation site, into build/site"
	@echo "make slurm-up  a throw-away SLURM cluster on this machine; make slurm-down removes it"
	@echo "make bench     measure every schedule on two cores; make bench-gpu on a GPU"
	@echo "make bench-gpu-published  the same against FedBERT as its published code computes"
	@echo "make clean     remove .venv and caches; runs/ stays"

# .venv itself changes whenever something is written into it, so a stamp says when it was complete.
# seqeval comes as source, which the pip of a new environment builds in isolation only when told to.
.venv: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "installing the packages of constraints.txt (1.9 GB, torch for CPUs or GPUs) into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt --use-pep517 seqeval
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0 -e ".[finetune,consortium,dev]"
	@touch $@

pretrain: $(READY)
	DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} $(BIN)/fedpipe pretrain --run-dir $(RUN_DIR)

consortium: $(READY)
	DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=1 $(BIN)/python examples/consortium.py

check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow" tests/unit

test: slurm-packages lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: export FEDPIPE_MATRIX = all
test-all: test test-transformers5

# Fine-tuning is left out: it needs adapters.
test-transformers5: $(NEWER)/.ready
	FEDPIPE_OTHER_PYTHON=$(CURDIR)/$(BIN)/python OMP_NUM_THREADS=1 $(NEWER)/bin/python -m pytest \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(addprefix tests/unit/test_,bad_input.py config.py evaluate.py face.py metrics.py models.py \
			optimizer.py split.py task_encoding.py tokenizer.py) \
		tests/distributed/test_engine.py $(addprefix tests/e2e/test_,evaluate.py pretrain.py versions.py)

$(NEWER)/.ready: constraints-transformers5.txt $(READY)
	@echo "installing the packages of constraints-transformers5.txt (180 MB) into $(NEWER)"
	$(PYTHON) -m venv --clear $(NEWER)
	echo "import site; site.addsitedir('$(CURDIR)/$$(echo $(VENV)/lib/python*/site-packages)')" \
		> $$(echo $(NEWER)/lib/python*/site-packages)/packages.pth
	$(NEWER)/bin/pip install --quiet --no-deps -r constraints-transformers5.txt
	@touch $@

# Debian packages for the tests on SLURM, if this user may install them; their services stay off.
slurm-packages:
	@$(PYTHON) slurm/local_cluster.py install

slurm-up: slurm-packages
	@$(PYTHON) slurm/local_cluster.py up

slurm-down:
	@$(PYTHON) slurm/local_cluster.py down

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site has an environment of its own: it needs none of the packages that train.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "build/site/index.html"

.venv-docs/.ready: docs/requirements.txt
	@echo "installing the packages of docs/requirements.txt into .venv-docs"
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r docs/requirements.txt
	@touch $@

bench: $(READY)
	$(BIN)/fedpipe throughput --config launch/configs/throughput_cpu.yaml --run-dir runs/bench

bench-gpu: $(READY)
	$(BIN)/fedpipe throughput --config launch/configs/throughput_gpu.yaml --run-dir runs/bench-gpu \
		--grid pipeline.compile=false,true pipeline.micro_batch_size=16,32,64

bench-gpu-published: $(READY)
	$(BIN)/fedpipe throughput --config launch/configs/throughput_gpu.yaml \
		--run-dir runs/bench-gpu-published \
		--grid data.padded_length=0,512 "pipeline.wire=[auto],[fp32]"

clean:
	rm -rf $(VENV) $(NEWER) .venv-docs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find fedpipe tests launch -name __pycache__ -type d -prune -exec rm -rf {} +
