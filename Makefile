# make demo   the fleet carries traffic past the loss of a director, on this machine
# make test   everything that is tested
# make        this list
#
# Both as root or through sudo, on Debian or Ubuntu: lab/setup installs what is missing. The rest:
#
# make demo-shell  the fleet, and a prompt to look around
# make build       build/ravel and the lab's programs
# make check       gofmt, go vet, staticcheck, unit tests on this machine's kernel; no root needed
# make e2e         only the tests of the whole fleet (lab/e2e)
# make bench       benchmarks, on this machine's kernel and on the lab kernel
# make clean       removes build/

SHELL := /bin/bash
export PATH := $(PATH):/usr/sbin:/sbin:/usr/local/go/bin
# What needs root runs through it.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo env "PATH=$$PATH" HOME=/root)

.PHONY: help build demo demo-shell test check e2e bench clean setup root
help:
	@sed -n 's/^# \{0,1\}//p; /^SHELL/q' Makefile

build:
	@lab/setup build
	@mkdir -p build
	@echo 'building (the first time takes some minutes)' >&2
	@CGO_ENABLED=0 go build -o build/ ./cmd/... ./lab/cmd/...

setup: root
	@lab/setup

root:
	@[ "$$(id -u)" -eq 0 ] || command -v sudo >/dev/null || { echo 'the lab makes network namespaces: run make as root, or install sudo' >&2; exit 1; }

demo: setup build
	@$(AS_ROOT) build/lab demo

demo-shell: setup build
	@$(AS_ROOT) build/lab shell

test: setup build
	@$(AS_ROOT) build/labtest

check: build
	@build/labtest -check

e2e: setup build
	@$(AS_ROOT) build/labtest -e2e

bench: setup build
	@$(AS_ROOT) build/labtest -bench

clean:
	@$(AS_ROOT) rm -rf build
