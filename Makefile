# The doors of this repository. `make setup` once, `make check` before every commit.

PYTHON ?= .venv/bin/python
# What takes seconds and breaks first: names, imports, documents, examples, text, images, formats,
# errors, and Gemma 3 against the oracle.
FAST = tests/test_imports.py tests/test_public_names.py tests/test_docs.py tests/test_doctests.py \
  tests/text tests/vision tests/evaluation tests/checkpoints/test_hf_config.py \
  tests/checkpoints/test_name_tables.py tests/checkpoints/test_bad_checkpoints.py \
  tests/checkpoints/test_exports.py tests/kernels/test_tiles.py tests/inference/test_sampling.py \
  tests/cli/test_errors.py tests/cli/test_tokenize.py tests/cli/test_info.py \
  tests/parity/test_gemma3_text.py

.PHONY: setup check lint types fast test nightly parity notebooks docs

setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -e ".[dev,demo]"

check: lint types fast

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m basedpyright

fast:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal $(FAST)

test:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal

nightly:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "nightly or not nightly"

# Every golden and invariance on this machine's JAX, Python and device, and the page of their figures;
# the page is written as well when some fail.
parity:
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "nightly or not nightly" \
	  --parity-only --parity-report out/parity.json; \
	status=$$?; $(PYTHON) docs/parity/page.py out/parity.json out/parity.html; exit $$status

# Runs the notebooks and stores their outputs: after a change of one, or of what they show.
notebooks:
	$(PYTHON) notebooks/execute.py

# The site. Figures are those of the stored run, or of a file: `make docs PARITY=out/parity.json`.
docs:
	PARITY=$(PARITY) NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
