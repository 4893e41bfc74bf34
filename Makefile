# Go is the one prerequisite; everything else `make deps` installs on Debian as root.
GO      ?= go
STAMP   := $(shell date -u +%Y-%m-%dT%H:%M:%SZ)
LDFLAGS := -s -w -X main.buildTime=$(STAMP)
BUILD   := CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)'

.PHONY: build demo test bench vuln deps clean help

build: ## bin/raid, bin/rai, bin/rai-keygen, bin/rai-crypto: static binaries
	@command -v $(GO) >/dev/null || { echo 'raid: Go 1.26 or newer is needed on PATH'; exit 1; }
	$(BUILD) -o bin/ ./cmd/...

demo: build deps ## start raid, enrol a key, submit contrib/examples/hello, watch it run
	sh contrib/demo.sh

test: deps ## all tests, with real ssh, git and Redis
	$(GO) test ./...

bench: build deps ## raid beside its peers, in one run; writes contrib/bench/RESULTS.md
	bash contrib/bench/run.sh

vuln: ## known vulnerabilities that this code calls (needs the vulnerability database)
	$(GO) run golang.org/x/vuln/cmd/govulncheck@latest ./...

deps: ## install what is missing (Debian, root) or say what is
	@sh contrib/deps.sh

clean: ## remove what was built
	rm -rf bin

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16
