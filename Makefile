# A thin front over CMake and scripts/. Everything here can be run by hand.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Paths relative to the sources: every clone of the repository shares the compiler cache.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
.PHONY: help setup setup-build build demo demo-gpu little-model test bench bench-full bench-docs format lint clean

help:
	@echo 'make demo    set up, build, and compare relay serve with llama-server on a long prompt'
	@echo 'make demo-gpu    set up vLLM for NVIDIA GPUs, and compare it with and without Relay there'
	@echo 'make little-model    train a small model whose answers can be checked, into build/little_model'
	@echo 'make test    set up, and run everything that CI checks (scripts/test.sh --list)'
	@echo 'make bench   set up, build, and measure the evaluation'\''s figures (15 minutes; needs an idle machine)'
	@echo 'make bench-full    the whole evaluation (a day; needs vLLM); make bench-docs writes docs/evaluation.md'
	@echo 'make build   set up, and build all programs and libraries into build/release'
	@echo 'make format  rewrite sources in the pinned format'
	@echo 'make lint    set up, build, and check format and lint only'
	@echo 'make clean   delete the build folders (not .deps and .venv*)'

setup:
	@scripts/setup.sh

setup-build:
	@scripts/setup.sh --no-cross --no-fuzz --no-cuda --no-browser

build: setup-build
	cmake --preset release
	cmake --build --preset release --target relay-programs

demo: build
	@.venv/bin/python scripts/demo

little-model: setup-build
	@scripts/little_model/make.sh

demo-gpu:
	@scripts/demo_gpu.sh

test: setup
	@scripts/test.sh

bench: build little-model
	@scripts/bench.sh bench --budget 15

bench-full: build little-model
	@scripts/bench.sh full

bench-docs: setup-build
	@scripts/bench.sh --docs

format: setup-build
	@scripts/format.sh

lint: setup
	@scripts/test.sh format build lint

clean:
	rm -rf build
