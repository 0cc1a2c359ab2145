# Every target does its own set-up; on a bare Debian nothing has to be done before.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup python tools demo demo-kubernetes test check bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Debian packages and .venv; does only what is missing
	@scripts/setup

python:
	@scripts/setup python

tools: setup
	@.venv/bin/thaw stack install
	@.venv/bin/thaw cluster install

demo: setup ## the whole path on this machine: a trace, Kafka, S3, CRIU, and a report (needs root)
	@.venv/bin/thaw demo

demo-kubernetes: setup ## the same on a Kubernetes cluster on this machine: pods, Services, Terraform (needs root; compiles Kubernetes once)
	@.venv/bin/thaw demo-kubernetes

test: setup check tools ## checks, then every test (needs root)
	.venv/bin/pytest

check: python ## style, types and import rules; no root needed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup ## figures for the README (needs root)
	@.venv/bin/thaw bench

clean: ## remove .venv, caches and reports of this checkout; installed tools and data stay (thaw stack down --purge)
	rm -rf .venv scaler/_compiled .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info reports
	find . -name __pycache__ -prune -exec rm -rf {} +
