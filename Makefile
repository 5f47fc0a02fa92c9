PYTHON ?= python3
ARGS ?=
# One process, on the first GPU or else on every core; spelled out, because accelerate warns of each default it takes.
# It is replaced as a whole: LAUNCH_ARGS='--multi_gpu --num_processes 4', or empty for what `accelerate config` wrote.
LAUNCH_ARGS ?= --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)}

BIN := .venv/bin
# There only while .venv is complete. Every path is relative, so the checkout may lie under a name with spaces.
STAMP := .venv/.complete
ONNXRUNTIME_WEB := .venv/node_modules/.package-lock.json
# Two workers share the cores: one torch thread each. A file stays with one of them, whose fixtures are made once.
# Text that is read or written in the encoding of the locale is an error.
PYTEST := OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-all test-demo lint docs clean

help:  ## Show this help
	@echo 'Usage: make TARGET [ARGS="..."] [LAUNCH_ARGS="..."] [PYTHON=python3.12]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' Makefile

train: $(STAMP)  ## Train with train_scripts/train_ekd.py; ARGS are its options, LAUNCH_ARGS those of accelerate launch
	@$(BIN)/accelerate launch --quiet $(LAUNCH_ARGS) train_scripts/train_ekd.py $(ARGS)

test: $(STAMP)  ## Run all tests but the slow ones; ARGS go to pytest
	@$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STAMP) $(ONNXRUNTIME_WEB)  ## Run all tests; the site's needs npm
	@$(PYTEST) $(ARGS)

test-demo: docs  ## Build the site and test its page that runs a net, in chromium
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --quiet 'playwright>=1.50'
	@$(BIN)/pytest -n 0 tests/browser $(ARGS)

lint: $(STAMP)  ## Check the code with ruff
	@$(BIN)/ruff check $(ARGS)

docs: $(STAMP) $(ONNXRUNTIME_WEB)  ## Build the documentation site into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html'

clean:  ## Remove .venv, caches, the site and built packages; output/ stays
	@rm -rf .venv dist site .pytest_cache .ruff_cache
	@find timm_ddnn timm_ddnn_cli tests train_scripts benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(ONNXRUNTIME_WEB): docs/demo/package-lock.json $(STAMP)
	@command -v npm >/dev/null || { echo 'npm must be there for the page docs/demo.md' >&2; exit 1; }
	@cp docs/demo/package.json docs/demo/package-lock.json .venv
	@npm ci --prefix .venv --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# An install that was cut short leaves no stamp, and begins again from an empty .venv.
$(STAMP): pyproject.toml
	@version=$$($(PYTHON) --version 2>&1) || version='not found'; \
	case "$$version" in \
		'Python 3.1'[1-9]*|'Python 3.'[2-9][0-9]*) ;; \
		*) echo "timm_ddnn needs Python 3.11 or newer, but $(PYTHON) is $$version." \
			'Name another: make PYTHON=python3.12 ...' >&2; exit 1 ;; \
	esac
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	@echo 'Installing timm_ddnn and what it needs into .venv, some minutes the first time'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@
