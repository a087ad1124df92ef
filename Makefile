# Needs Go, GNU make 4 and Python 3.11 with its venv module. With a C compiler the tests run under the race detector.
# Go modules and pip bring everything else. What is made stands under .parts/.

FUZZTIME ?= 10s
venv := $(CURDIR)/.parts/venv
race := $(if $(shell command -v gcc || command -v cc),-race)

export PYTHONDONTWRITEBYTECODE := 1
unexport FUZZTIME # which tests take for an order to go on
export GOLANGCI_LINT_CACHE := $(CURDIR)/.parts/golangci-lint

.PHONY: help build parts clients demo up test vet lint unit fuzz python conformance bench golden proto lock clean
.NOTPARALLEL: test

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

build: ## Build .parts/bin/sallyport, and the demo
	go build -o .parts/bin/ ./cmd/sallyport ./test/demo

parts: ## Install what the demo runs: Envoy, a model server with its model, Chroma, their clients
	deploy/parts/install.sh

clients: parts ## Install the official Python clients that the tests use
	deploy/parts/clients.sh

demo: build parts ## Run the RAG application behind the gateway, and check every verdict
	.parts/bin/demo

up: build parts ## Start the demo and leave it running until Ctrl-C
	.parts/bin/demo -stay

test: parts vet lint unit fuzz python demo ## Everything that must pass, in this order

vet:
	go vet ./...

lint: ## Look for mistakes (.golangci.yaml)
	go tool -modfile=tools/go.mod golangci-lint run ./...

unit: parts clients ## Run the Go tests, under the race detector where there is a C compiler
	go test $(race) ./...

# Now and then go test fails a target because its time is over (go.dev/issue/75804). Then it names no input.
only_late = { grep -qx '    context deadline exceeded' .parts/fuzz.log && ! grep -q 'Failing input written\|panic:' .parts/fuzz.log; }

fuzz: parts ## Fuzz every target for FUZZTIME (10s), and the real Envoy with policies and bodies for as long
	@grep -rEo --include='*_test.go' '^func Fuzz\w+' */ | while IFS=: read -r file target; do \
		(set -x; go test ./$${file%/*} -run '^$$' -fuzz "^$${target#func }\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x; \
			echo $$? >.parts/fuzz.status) 2>&1 | tee .parts/fuzz.log; \
		[ "$$(cat .parts/fuzz.status)" = 0 ] || $(only_late) || exit 1; \
	done
	FUZZTIME=$(FUZZTIME) go test ./test/real -count 1 -timeout 0 -v -run '^(TestPolicies|TestBodiesAsDecodersReadThem)$$'

python: parts ## Run the tests of the examples
	cd examples/rag && $(venv)/bin/python -m unittest discover -p '*_test.py'

conformance: parts ## Run the public conformance tests of MCP through the gateway (needs npm, on Linux for amd64)
	mkdir -p .parts/conformance && cp deploy/parts/conformance/package*.json .parts/conformance/
	npm ci --prefix .parts/conformance --ignore-scripts --no-audit --no-fund
	CONFORMANCE=$(CURDIR)/.parts/conformance go test ./test/real -run TestMCPConformance -count 1 -v

bench: build parts ## Measure what the gateway costs
	go run ./test/bench

golden: ## Write the golden files anew; read the difference before you commit it
	go test $$(grep -rl --include='*_test.go' 'flag.Bool("update"' */ | sed 's|^|./|; s|/[^/]*$$||' | sort -u) -update

proto: ## Generate the Go code of every .proto anew
	python3 -m venv .parts/protoc && .parts/protoc/bin/pip install --quiet grpcio-tools==1.85.1
	go build -modfile=tools/go.mod -o .parts/protoc/bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/.parts/protoc/bin:$$PATH" .parts/protoc/bin/python -m grpc_tools.protoc -I. --go_out=. --go-grpc_out=. \
		--go_opt=paths=source_relative --go-grpc_opt=paths=source_relative identity/node/nodepb/node.proto

lock: ## Write the lock files of the parts anew (needs uv)
	deploy/parts/lock.sh

clean: ## Remove .parts/
	rm -rf .parts
