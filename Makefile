# The two commands: `make demo` and `make test`. Both set everything up first.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

export PATH := $(abspath $(BIN)):$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))

.PHONY: demo test bench build wheel clean

demo: build
	$(BIN)/python -m ray_zerocopy.demo

test: build
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN))/python cargo clippy --all-targets --features python -- -D warnings
	cargo test --quiet
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

# One bench embeds Python: it runs where there is a library of it to link.
LIBPYTHON = $(shell $(BIN)/python -c "from sysconfig import get_config_var as var; \
	print(var('LIBDIR') + '/' + var('LDLIBRARY'))")

bench: build
	$(BIN)/pip install --quiet --editable ".[bench]" --no-build-isolation
	PYO3_PYTHON=$(abspath $(BIN))/python LD_LIBRARY_PATH=$(dir $(LIBPYTHON)) \
		cargo bench $(if $(wildcard $(LIBPYTHON)),--features python)
	$(BIN)/pytest benches --benchmark-only
	$(BIN)/python benches/report.py

# Everything that Python needs, once; then the extension, whenever Rust changes.
build: $(BIN)/.installed
	$(BIN)/maturin develop --release --quiet

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.9.4,<2"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

wheel: $(BIN)/.installed
	$(BIN)/maturin build --release --out dist

clean:
	rm -rf target dist $(VENV)
