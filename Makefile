# Everything a developer runs. `make help` lists it.

VENV ?= .venv
RUN ?= runs/digits
BUNDLE ?= bundles/digits
# The first of these that is Python 3.11 or newer; PYTHON=... chooses another.
PYTHON ?= $(firstword $(foreach candidate,python3 python3.11 python3.12 python3.13 python3.14,\
	$(shell $(candidate) -c 'import sys; print("$(candidate)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VISION := $(VENV)-vision
RIVALS := $(VENV)-rivals
SERVERS := $(VENV)-servers

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs test-vision test-browser gpu-check vendor-web clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## /\1\t/' | expand -t 14

# The stamp is newer than what it was installed from, so that nothing is installed twice.
$(STAMP): pyproject.toml constraints.txt
	$(call environment,$(VENV),dev)

$(VISION)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VISION),dev$(,)vision)

, := ,
define environment
	@if [ -z "$(PYTHON)" ]; then \
		echo "deploykit needs Python 3.11 or newer; found: $$(python3 --version 2>&1)." \
			"Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@echo "setting up $(1)"
	@rm -f $(1)/.installed
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[$(2)]'
	@touch $(1)/.installed
endef

demo: $(STAMP) ## train, prune, quantize, export, verify and predict a digit
	$(BIN)/deploykit compress recipes/digits.yaml --out $(RUN) --force
	$(BIN)/deploykit export $(RUN) --out $(BUNDLE) --force
	$(BIN)/deploykit verify $(BUNDLE)
	$(BIN)/deploykit predict $(BUNDLE) $(BUNDLE)/golden/000.png
	@echo
	@echo "run:    $(RUN) (open $(RUN)/report.html)"
	@echo "bundle: $(BUNDLE) (copy it anywhere; python run.py selftest)"

# A process a core; a file stays in one, so that its fixtures are made once.
test: $(STAMP) ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --dist=loadfile

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## check types
	$(BIN)/mypy

docs: $(STAMP) ## write docs/recipe.md from the models
	$(BIN)/python -m deploykit.recipe.document > docs/recipe.md.new
	mv docs/recipe.md.new docs/recipe.md

# These benchmarks need torchvision.
$(addprefix bench-,architectures coverage): bench-%: $(VISION)/.installed
	$(VISION)/bin/python benchmarks/$*.py

# bench-latency-model and bench-latency_model are the same.
bench-%: FILE = benchmarks/$(subst -,_,$*).py
bench-%: $(STAMP) ## run benchmarks/%.py and keep its table in benchmarks/results
	@test -f $(FILE) || { echo "there is no $(FILE)" >&2; exit 1; }
	$(BIN)/python $(FILE)

vendor-web: $(STAMP) ## fetch the recorded onnxruntime-web again
	$(BIN)/python -m deploykit.web.vendored

gpu-check: $(STAMP) ## export and serve on an NVIDIA GPU; says so where there is none
	$(BIN)/python benchmarks/gpu_check.py

test-vision: $(VISION)/.installed ## test torchvision and timm models in their own environment
	$(VISION)/bin/python -m pytest tests/vision

test-browser: $(VENV)/.browser ## test every page in a real browser (needs chromium or chrome)
	$(BIN)/python -m pytest tests/browser

$(VENV)/.browser: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,browser]'
	@touch $@

bench-resnet20 bench-resnet56: $(RIVALS)/.installed

bench-pruning: $(VENV)/.torch-pruning

# It needs nothing that is not there already.
$(VENV)/.torch-pruning: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torch-pruning==1.6.1
	@touch $@

# What others quantize with; their versions are part of the figures.
$(RIVALS)/.installed: Makefile
	@rm -f $@
	@$(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip install --quiet --disable-pip-version-check \
		nncf==3.4.0 openvino==2026.4.0 onnx==1.23.2 onnxruntime==1.31.1 sympy==1.14.0
	@touch $@

bench-serving bench-bad-requests bench-bad_requests: $(SERVERS)/.installed

bench-browser bench-targets: $(VENV)/.browser

# What others serve with, and what derives bad requests from a server's own description.
$(SERVERS)/.installed: Makefile
	@rm -f $@
	@$(PYTHON) -m venv $(SERVERS)
	@$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		bentoml==1.4.39 fastapi==0.165.0 litserve==0.2.19 schemathesis==4.32.5 \
		'uvicorn[standard]==0.54.0' onnxruntime==1.31.1 numpy==2.4.6 pillow==13.0.0
	@touch $@

clean: ## remove environments, runs and bundles
	rm -rf $(VENV) $(VISION) $(RIVALS) $(SERVERS) runs bundles .mypy_cache .pytest_cache .ruff_cache .hypothesis
