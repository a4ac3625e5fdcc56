# `make` alone prints this file's targets; setup.sh does what is missing, so every target works from nothing.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PYTHON_VENV := .venv/bin/python
OBJECT := build/bpf/podwire.bpf.o
DEMO_SECONDS ?= 0
TESTS ?= tests
KERNELS ?= 5.10,6.1,6.12,7
MAVEN_DEPENDENCY := org.apache.maven.plugins:maven-dependency-plugin:2.8

.PHONY: help setup bpf kafka registry demo test kernels fault lint bench abi docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo DEMO_SECONDS=30     ends by itself; its last line is one JSON object"
	@echo "  make test TESTS=tests/unit    only some tests; PODWIRE_TEST_BOOTSTRAP=host:port uses that Kafka"

setup: ## install what is missing: packages, Python environment, BPF object, Kafka, schema registry
	@deploy/setup.sh

bpf: $(OBJECT) ## compile the BPF object

$(OBJECT): $(wildcard bpf/*.c bpf/*.h bpf/Makefile)
	@$(MAKE) -C bpf
	@touch $@

kafka: ## fetch Apache Kafka's jars from Maven Central to build/kafka
	mvn -B -q -f deploy/kafka/pom.xml $(MAVEN_DEPENDENCY):copy-dependencies "-DoutputDirectory=$(CURDIR)/build/kafka/libs"

registry: ## fetch a schema registry from Maven Central to build/registry, for the tests
	@rm -rf build/registry
	mvn -B -q -C -f deploy/registry/pom.xml $(MAVEN_DEPENDENCY):unpack "-Dregistry.folder=$(CURDIR)/build/registry"

demo: export PODWIRE_SETUP_FOR := demo

demo: setup ## show the whole pipeline on this machine, until Ctrl-C (root)
	@exec $(PYTHON_VENV) -m podwire demo --seconds $(DEMO_SECONDS)

# More system packages than the demo needs.
test kernels: export PODWIRE_SETUP_FOR := tests

test: setup ## run all tests (root, for the probes)
	@exec $(PYTHON_VENV) -m pytest $(TESTS)

kernels: setup ## run the scenarios on other kernels, in QEMU guests: kernel x tier x scenario
	@exec $(PYTHON_VENV) -m tests.kernel.guests --kernels $(KERNELS)

fault: setup ## kill, cut, stall and fill everything in mid-traffic, and balance the books (root; about 16 minutes)
	@exec $(PYTHON_VENV) -m tests.fault

lint: setup ## check style, types and import layers
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy
	.venv/bin/lint-imports

bench: setup ## measure; each file in bench/ prints a table and a JSON line
	@for name in collector corrections enricher kernel latency; do echo "== $$name"; $(PYTHON_VENV) -m bench.$$name || exit 1; done

abi: setup ## generate collector/node/abi.py from the object's BTF
	@$(MAKE) -C bpf abi

docs: setup ## generate docs/reference.md from settings, metrics and schemas, docs/kernels.md from the scenarios
	@$(PYTHON_VENV) docs/generate.py
	@$(PYTHON_VENV) -m tests.kernel.scenarios

lock: setup ## lock the Python packages that pyproject.toml asks for
	@$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check uv
	@$(PYTHON_VENV) -m uv pip compile pyproject.toml --all-extras --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-header --no-annotate --quiet --output-file requirements/all.txt

clean: ## remove what was built; the Python environment stays
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
