# The two commands: `make demo` and `make test`. Both set everything up first.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

export PATH := $(abspath $(BIN)):$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))

.PHONY: demo test chaos fuzz sanitize matrix bench docs build wheel clean

demo: build
	$(BIN)/python -m ray_zerocopy.demo

test: build
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN))/python cargo clippy --all-targets --features python -- -D warnings
	cargo clippy --all-targets --features portable -- -D warnings
	cargo test --quiet
	cargo test --quiet --features portable
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder
	rm -rf target/portable
	$(BIN)/maturin build --release --quiet --features python,portable --out target/portable
	$(BIN)/python -m zipfile -e target/portable/*.whl target/portable
	PYTHONPATH=$(abspath target/portable) $(BIN)/pytest tests/portable.py

# Lose the head node (needs redis-server), kill publishers and readers KILLS times, kill the catalog
# at each step of each change, then MINUTES of random faults: the same SEED gives the same ones.
KILLS ?= 100
MINUTES ?= 10
SEED ?= 0

chaos: export PYTHONPATH = tests
chaos: build
	$(BIN)/python -W ignore tests/chaos/head.py
	$(BIN)/python -W ignore tests/chaos/serve_command.py
	$(BIN)/python -W ignore tests/chaos/kills.py $(KILLS) $(SEED)
	$(BIN)/python -W ignore tests/chaos/steps.py
	$(BIN)/python -W ignore tests/chaos/soak.py $(MINUTES) $(SEED)

# CASES random inputs for each law of tables, headers, snapshots, layouts and views.
CASES ?= 1000000

fuzz: build
	PROPTEST_CASES=$(CASES) cargo test --profile fuzz --lib -- format:: io::
	CASES=$(CASES) SEED=$(SEED) $(BIN)/pytest -s tests/test_fuzz.py

# The tests of the Rust core under AddressSanitizer. RUSTC_BOOTSTRAP allows -Z on a stable compiler.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')

sanitize:
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --quiet --lib --target $(HOST) \
		--target-dir target/sanitized

# The suite on pairs of torch and Ray, each in its own environment: 6 GB and 5 minutes a pair. All
# pairs, or PAIRS="2.6/2.43 2.8/2.48". Some need another Python on the PATH.
matrix: wheel
	$(BIN)/python tests/matrix.py dist/*_x86_64.whl $(PAIRS)

# One bench embeds Python: it runs only if libpython is installed.
LIBPYTHON = $(shell $(BIN)/python -c "from sysconfig import get_config_var as var; \
	print(var('LIBDIR') + '/' + var('LDLIBRARY'))")

bench: build
	$(BIN)/pip install --quiet --editable ".[bench]" --no-build-isolation
	PYO3_PYTHON=$(abspath $(BIN))/python LD_LIBRARY_PATH=$(dir $(LIBPYTHON)) \
		cargo bench $(if $(wildcard $(LIBPYTHON)),--features python)
	$(BIN)/pytest benches --benchmark-only
	$(BIN)/python benches/report.py

# The site. Warnings are errors: unknown names and broken internal links are warnings.
docs: build
	$(BIN)/pip install --quiet --editable ".[docs]" --no-build-isolation
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html

# The Python environment, once. Then the extension, whenever Rust changes.
build: $(BIN)/.installed
	$(BIN)/maturin develop --release --quiet

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "maturin>=1.9.4,<2"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# For glibc 2.17 and later: zig links against the symbols of 2.17.
wheel: $(BIN)/.installed
	rustup target add x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu
	for arch in x86_64 aarch64; do $(BIN)/maturin build --release --zig --out dist \
		--compatibility manylinux_2_17 --target $$arch-unknown-linux-gnu || exit 1; done
	$(BIN)/maturin sdist --out dist

clean:
	rm -rf target dist $(VENV)
