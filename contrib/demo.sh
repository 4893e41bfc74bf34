#!/bin/sh
# The whole of raid on one machine: `make demo` runs this after `make build`.
set -eu
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
raid=
stop() {
	status=$?
	if [ -n "$raid" ]; then kill "$raid" && wait "$raid" || :; fi
	[ $status = 0 ] || { echo "demo: failed; what raid said:"; tail -20 "$dir/raid.log"; }
	rm -rf "$dir"
	exit $status
}
trap stop EXIT
trap 'exit 130' INT TERM

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n$ %s\n' "$*"; }

say "raid serve --state DIR --listen 127.0.0.1:0"
bin/raid serve --state "$dir/state" --listen 127.0.0.1:0 2>"$dir/raid.log" &
raid=$!
# tail ends at the line that says raid is ready, or when raid has gone.
addr=$(tail --pid=$raid -n +1 -f "$dir/raid.log" | sed -n 's/^raid: listening on //p;T;q')
[ -n "$addr" ] || { echo "demo: raid did not start"; exit 1; }
host=${addr%:*} port=${addr##*:}
grep '^raid: ' "$dir/raid.log"

say "rai-keygen --server rai@$addr -i DIR/admin -u ada -e ada@example.edu -r student -t team7 --out KEYS"
bin/rai-keygen --server "rai@$addr" -i "$dir/state/admin" -u ada -e ada@example.edu -r student -t team7 --out "$dir/keys"

echo "[$host]:$port $(cut -d' ' -f1,2 "$dir/state/host_key.pub")" >"$dir/known_hosts"
rai() { ssh -T -F none -i "$dir/keys/ada" -o IdentitiesOnly=yes -o UserKnownHostsFile="$dir/known_hosts" -p "$port" "rai@$host" "$@"; }

say "ssh rai@host"
rai

say "tar cf - -C contrib/examples/hello . | ssh rai@host submit"
tar cf - -C contrib/examples/hello . | rai submit

say "ssh rai@host output 1 | tar xf - -O greeting.txt"
rai output 1 | tar xf - -O ./greeting.txt 2>/dev/null || rai output 1 greeting.txt | tar xf - -O

say "ssh rai@host submit -- 'exit 42'"
rai submit -- 'exit 42' </dev/null && exit 1 || status=$?
echo "ssh exited with $status"
[ "$status" = 42 ]

say "ssh rai@host history"
rai history
echo
echo "demo: that was raid"
