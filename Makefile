# SPDX-License-Identifier: Apache-2.0

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Each step is a judgement of its own; their outputs are not to mix.
.NOTPARALLEL:

BIN := .venv/bin
READY := .venv/.ready
SHELL_SCRIPTS := $(sort $(wildcard src/virt_dib/guest/*.sh)) $(filter-out %.py,$(sort $(wildcard scripts/*))) .ci/run
GENERATED_FROM := $(wildcard *.md docs/* generate/*.py generate/templates/* po/*)
SOURCES := $(shell find src/virt_dib -name '*.py' -o -name '*.sh') scripts/demo scripts/mirrors

.PHONY: help
help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: setup
setup: $(READY) ## install what is needed: packages, and .venv

$(READY): requirements-dev.txt pyproject.toml setup.py MANIFEST.in $(GENERATED_FROM) scripts/setup
	@scripts/setup
	@touch $@

.PHONY: demo
demo: demo/booted ## build a Debian image in demo/ and boot it
	@echo "demo: demo/debian.qcow2 is built, newer than its sources, and boots; 'make demo-clean' removes it"

demo/debian.qcow2: $(SOURCES) | $(READY)
	@scripts/demo

demo/booted: demo/debian.qcow2
	@$(BIN)/virt-dib-boot-test demo/debian.qcow2
	@touch $@

.PHONY: demo-clean
demo-clean: ## remove what 'make demo' built
	rm -rf demo

.PHONY: test
test: lint audit ## lint, types, and all tests but the longest
	@scripts/test

.PHONY: docs
docs: $(READY) ## manual pages and HTML in build/share
	@$(BIN)/python -m generate.share

.PHONY: lint
lint: $(READY) ## format, lint, types, shell scripts
	$(BIN)/ruff format --quiet --check .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	shellcheck $(SHELL_SCRIPTS)

.PHONY: audit
audit: $(READY) ## the Python packages: hashes, changes, known vulnerabilities if the network is there
	@$(BIN)/python scripts/audit.py

.PHONY: test-unit
test-unit: $(READY) ## tests that start no virtual machine
	$(BIN)/pytest

.PHONY: test-appliance
test-appliance: $(READY) ## tests that start virtual machines
	$(BIN)/pytest -m "appliance and not full"

.PHONY: test-sandbox
test-sandbox: $(READY) ## tests of the sandbox alone
	$(BIN)/pytest -m "sandbox and not full"

.PHONY: test-debian
test-debian: $(READY) ## full Debian builds, each booted; long
	$(BIN)/pytest -m debian

.PHONY: test-full
test-full: $(READY) ## builds of elements from elsewhere and with older releases, and ramdisks of Debian; hours, needs the network
	$(BIN)/pytest -m full

.PHONY: test-drop-in
test-drop-in: $(READY) ## disk-image-create compared with ours, a table of it in build/drop-in-comparisons.txt; as root
	$(BIN)/pytest -m drop_in --comparisons build/drop-in-comparisons.txt

.PHONY: failure-branches
failure-branches: export COVERAGE_DIR := $(CURDIR)/build/coverage
failure-branches: $(READY) ## the tests with a list of which reach each failure branch, build/failure-branches.txt
	rm -rf $(COVERAGE_DIR)
	mkdir -p --mode=1777 $(COVERAGE_DIR)
	COVERAGE_PROCESS_START=$(CURDIR)/tests/coverage.ini $(MAKE) --no-print-directory test
	PYTHONPATH=. $(BIN)/python tests/failure_branches.py $(COVERAGE_DIR) >build/failure-branches.txt || \
	    { sed -n '/without a test$$/,$$p' build/failure-branches.txt; exit 1; }

COUNT := 50
.PHONY: soak
soak: $(READY) ## COUNT small builds with faults, and a look at what each of them leaves
	@$(BIN)/python tests/soak.py --count $(COUNT) $(ARGS)

.PHONY: bench
bench: $(READY) ## a small build, timed against the virt-dib of guestfs-tools
	@$(BIN)/python bench/tiny_build.py

.PHONY: bench-debian
bench-debian: $(READY) ## Debian builds, timed against the appliance and, as root, disk-image-create; hours
	@$(BIN)/python bench/debian_build.py $(ARGS)
