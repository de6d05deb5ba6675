PYTHON ?= python3
VENV ?= .venv
QUESTION ?= When are default parameter values of a function evaluated?
export QUESTION
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
KERNELS := CMakeLists.txt $(wildcard kernels/*.h kernels/*.cpp)
.PHONY: help run test check kernels sanitize

help: ## Show these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/'

run: $(VENV)/.ready-to-run ## Answer a question of the Python language reference: make run QUESTION="..."
	$(BIN)/longspan answer "$$QUESTION"

test: $(VENV)/.ready-to-test ## Run the tests, in as many processes as there are cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/.ready-to-test ## Check format, lint, types and spelling
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright src
	$(BIN)/codespell

kernels: ## Compile what changed in kernels/
	cmake -S . -B build/kernels
	cmake --build build/kernels --parallel

sanitize: ## Run kernels/tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -DLONGSPAN_SANITIZE=ON -DLONGSPAN_TESTS=ON
	cmake --build build/sanitize --parallel
	ctest --test-dir build/sanitize --output-on-failure

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-to-run: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "Installing longspan in $(VENV) (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

$(VENV)/.ready-to-test: pyproject.toml constraints.txt | $(VENV)/.ready-to-run
	@echo "Installing the test tools in $(VENV)"
	$(PIP) --config-settings=wheel.cmake=false -e '.[dev]'  # the kernels are compiled already
	@touch $(VENV)/.ready-to-run $@
