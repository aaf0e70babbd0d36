# make demo   the fleet carries traffic past the loss of a director, on this machine
# make test   everything that is tested, but for make histories
# make        this list
#
# Both as root or through sudo, on Debian or Ubuntu: lab/setup installs what is missing. The rest:
#
# make demo-shell  the fleet, and a prompt to look around
# make build       build/ravel and the lab's programs
# make check       gofmt, go vet, staticcheck, unit tests on this machine's kernel; no root needed
# make e2e         only the tests of the whole fleet (lab/e2e), from files and from a Kubernetes cluster
# make kube        of these the ones with a Kubernetes control plane, which it builds first: some 10 minutes, once
# make histories   those of them that take long: 50 random histories, 200 scale changes, deaths, partitions; an hour
# make bench       benchmarks, on this machine's kernel and on the lab kernel
# make image       build/image: the container image for this machine's architecture, an archive and a directory
# make release     build/release: programs and one image for amd64 and arm64, SBOM, checksums; and tests all of it
# make clean       removes build/

SHELL := /bin/bash
# Go as it must be for this checkout, and the same as root.
GO := lab/goenv
AS_ROOT := lab/goenv -root

.PHONY: help build demo demo-shell test check e2e kube histories bench image next release clean setup root modules
help:
	@sed -n 's/^# \{0,1\}//p; /^SHELL/q' Makefile

# What root left in build/ is the checkout's owner's again. git looks also at a checkout that another user owns.
build:
	@lab/setup build
	@mkdir -p build && [ -z "$$(find build ! -user "$$(id -u)" -print -quit)" ] || [ "$$(id -u)" -eq 0 ] || \
		sudo chown -R --reference=. build
	@echo 'building (the first time takes some minutes)' >&2
	@trap '[ "$$(id -u)" -ne 0 ] || chown -R --reference=. build' EXIT; \
	version=$$(git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo dev); \
	revision=$$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null || true); \
	CGO_ENABLED=0 $(GO) go build -ldflags "-X main.version=$$version -X main.revision=$$revision" \
		-o build/ ./cmd/... ./lab/cmd/...

# All modules that tests need, so that root fetches none.
modules:
	@$(GO) go list -deps -test ./... tool >/dev/null
	@$(GO) go -C deploy/release list -deps -test ./... tool >/dev/null

setup: root
	@lab/setup

root:
	@[ "$$(id -u)" -eq 0 ] || command -v sudo >/dev/null || { echo 'the lab makes network namespaces: run make as root, or install sudo' >&2; exit 1; }

demo: setup build
	@$(AS_ROOT) build/lab demo

demo-shell: setup build
	@$(AS_ROOT) build/lab shell

test: setup build modules
	@$(AS_ROOT) build/labtest

check: build
	@$(GO) build/labtest -check

e2e: setup build modules image next
	@lab/setup kube
	@$(AS_ROOT) build/labtest -e2e -kube

kube: setup build modules image next
	@lab/setup kube
	@$(AS_ROOT) build/labtest -kube

histories: setup build modules image next
	@lab/setup kube
	@$(AS_ROOT) build/labtest -histories
	@$(AS_ROOT) build/labtest -kube -histories

bench: setup build modules
	@$(AS_ROOT) build/labtest -bench

# docs/image.md. Neither needs root; DEBIAN_MIRROR and DEBIAN_SECURITY_MIRROR name other archives.
image:
	@lab/setup image
	@trap '[ "$$(id -u)" -ne 0 ] || chown -R --reference=. build' EXIT; \
	$(GO) go -C deploy/release run . image

# A ravel that says that it is another release, for tests of upgrades.
next:
	@mkdir -p build/image/next/usr/bin
	@CGO_ENABLED=0 $(GO) go build -trimpath -ldflags '-X main.version=next' -o build/image/next/usr/bin/ ./cmd/ravel

release:
	@lab/setup release
	@echo 'building the release (the first time takes some minutes)' >&2
	@trap '[ "$$(id -u)" -ne 0 ] || chown -R --reference=. build' EXIT; \
	$(GO) go -C deploy/release run . release && $(GO) go -C deploy/release test -count=1 -tags=released -v .

# The module cache of who has no home may be in there, whose folders cannot be written to.
clean:
	@[ ! -e build ] || rm -rf build 2>/dev/null || $(AS_ROOT) rm -rf build
