#!/bin/sh
# Shows on a machine with GPUs that raid gives each job its own and no other:
#
#     make build && sh contrib/gpu-check.sh      # root, bubblewrap, an NVIDIA driver
#
# One line for each finding, "ok", "skip" or "FAIL"; the exit status is 0 if nothing
# failed. It starts a raid of its own in a temporary folder, on a free port, and leaves
# nothing behind.
# shellcheck disable=SC2016,SC2317  # $ in single quotes is the job's; finish is called by trap
set -u
cd "$(dirname "$0")/.." || exit 1
failed=0
ok() { printf 'ok    %s\n' "$1"; }
skip() { printf 'skip  %s\n' "$1"; }
fail() {
	printf 'FAIL  %s\n' "$1"
	failed=1
}
# show FILE…: why something failed, indented.
show() {
	for file in "$@"; do
		sed "s/^/      | /" "$file" | tail -20
	done
}
# verdict STATUS OK FAIL [FILE…]: one line, and the files if it failed.
verdict() {
	status=$1 good=$2 bad=$3
	shift 3
	if [ "$status" = 0 ]; then
		ok "$good"
	else
		fail "$bad"
		show "$@"
	fi
}
die() {
	verdict 1 '' "$@"
	exit 1
}

command -v nvidia-smi >/dev/null || die "no nvidia-smi: this machine has no NVIDIA GPU, or no driver"
for program in bin/raid bin/rai-keygen ssh bwrap tar timeout; do
	command -v "$program" >/dev/null || die "$program is missing (make build; apt install bubblewrap openssh-client)"
done

dir=$(mktemp -d) || exit 1
raid=''
finish() {
	ended=$?
	if [ -n "$raid" ]; then
		kill "$raid" 2>/dev/null
		wait "$raid"
	fi
	rm -rf "$dir"
	exit "$ended"
}
trap finish EXIT
trap 'exit 130' INT TERM

# What the machine says, by a way that is not raid's.
timeout 60 nvidia-smi -L >"$dir/list" 2>&1 || die "nvidia-smi does not answer" "$dir/list"
gpus=$(grep -c '^GPU .*(UUID: GPU-' "$dir/list")
slices=$(grep -c '(UUID: MIG-' "$dir/list")
[ "$gpus" -gt 0 ] || die "nvidia-smi lists no GPU" "$dir/list"
ok "nvidia-smi lists $gpus GPUs and $slices MIG slices"
ls /dev/nvidiactl /dev/nvidia[0-9]* >"$dir/nodes" 2>&1
verdict $? "device nodes of $(grep -c 'nvidia[0-9]' "$dir/nodes") GPUs are in /dev" "device nodes are missing" "$dir/nodes"
if [ -d /proc/driver/nvidia/gpus ]; then
	grep -h 'GPU UUID' /proc/driver/nvidia/gpus/*/information | grep -o 'GPU-[^ ]*' >"$dir/known"
	grep -q -F -f "$dir/known" "$dir/list"
	verdict $? "/proc/driver/nvidia knows them, too" "/proc/driver/nvidia and nvidia-smi name different GPUs" "$dir/known" "$dir/list"
else
	skip "there is no /proc/driver/nvidia to compare with"
fi
if [ "$(id -u)" = 0 ]; then ok "root: every limit of the box holds"; else skip "not root: some limits of the box do not hold"; fi

# A raid with local runners and the bubblewrap box.
printf '[box]\nengine = "bwrap"\n' >"$dir/raid.toml"
bin/raid serve --state "$dir/state" --listen 127.0.0.1:0 --config "$dir/raid.toml" 2>"$dir/log" &
raid=$!
addr=''
tries=0
while [ -z "$addr" ] && [ $tries -lt 60 ] && kill -0 "$raid" 2>/dev/null; do
	addr=$(sed -n 's/^raid: listening on //p' "$dir/log")
	tries=$((tries + 1))
	sleep 1
done
[ -n "$addr" ] || die "raid did not start" "$dir/log"
ok "raid understood nvidia-smi, and listens on $addr"
bin/rai-keygen --server "rai@$addr" -i "$dir/state/admin" -u check -e check@example.edu -r student --out "$dir/keys" >"$dir/keygen" 2>&1 ||
	die "no key could be enrolled" "$dir/keygen"
echo "[127.0.0.1]:${addr##*:} $(cut -d' ' -f1,2 "$dir/state/host_key.pub")" >"$dir/known_hosts"
rai() {
	timeout 300 ssh -T -F none -i "$dir/keys/check" -o IdentitiesOnly=yes -o BatchMode=yes \
		-o UserKnownHostsFile="$dir/known_hosts" -p "${addr##*:}" rai@127.0.0.1 "$@"
}
# job NAME GPUS COMMAND: its output in $dir/NAME, raid's words in $dir/NAME.err.
job() { rai submit --gpus "$2" -- "$3" </dev/null >"$dir/$1" 2>"$dir/$1.err"; }

# One job, one GPU.
job one 1 'echo uuid $CUDA_VISIBLE_DEVICES; ls -d /dev/nvidia[0-9]* | sed "s/^/node /"; nvidia-smi -L | sed "s/^/smi /"' ||
	die "a job with one GPU did not run" "$dir/one" "$dir/one.err" "$dir/state/runners/0/log"
mine=$(sed -n 's/^uuid //p' "$dir/one")
grep -q -F "(UUID: $mine)" "$dir/list"
verdict $? "a job has $mine, one of the machine's" "a job has a GPU that nvidia-smi does not list" "$dir/one" "$dir/list"
[ "$(grep -c '^node ' "$dir/one")" = 1 ]
verdict $? "it sees $(sed -n 's/^node //p' "$dir/one") and no other node" "it does not see exactly one node" "$dir/one"
grep '^smi ' "$dir/one" | grep -q -F "$mine" && [ "$(grep -c '^smi GPU ' "$dir/one")" = 1 ]
verdict $? "nvidia-smi in its box lists that GPU alone" "nvidia-smi in its box does not list that GPU alone" "$dir/one"
rai status 1 >"$dir/status" 2>&1
grep -q "^gpu .*$mine" "$dir/status"
verdict $? "its result has $(sed -n 's/^gpu *//p' "$dir/status")" "its result does not name the GPU" "$dir/status"

# No GPU for a job without one.
job none 0 'ls /dev/nvidia* 2>/dev/null; echo "$CUDA_VISIBLE_DEVICES|$NVIDIA_VISIBLE_DEVICES"'
[ "$(cat "$dir/none")" = '|void' ]
verdict $? "a job without a GPU sees none" "a job without a GPU did not run, or sees something" "$dir/none" "$dir/none.err"

# Two at once: another GPU, or one after the other.
busy='echo $CUDA_VISIBLE_DEVICES; date +%s%N; sleep 3; date +%s%N'
job first 1 "$busy" &
first=$!
job second 1 "$busy"
wait "$first"
line() { sed -n "$2p" "$dir/$1"; }
if [ -z "$(line first 3)" ] || [ -z "$(line second 3)" ]; then
	verdict 1 '' "two jobs at once did not both run" "$dir/first.err" "$dir/second.err"
elif [ "$(line first 1)" != "$(line second 1)" ]; then
	ok "two jobs at once have different GPUs"
elif [ "$(line first 3)" -le "$(line second 2)" ] || [ "$(line second 3)" -le "$(line first 2)" ]; then
	ok "two jobs at once take turns on the one GPU"
else
	fail "two jobs had $(line first 1) at the same time"
fi

# A CUDA program.
nvcc=''
for found in "$(command -v nvcc)" /usr/local/cuda/bin/nvcc /opt/cuda/bin/nvcc; do
	if [ -z "$nvcc" ] && [ -x "$found" ]; then nvcc=$found; fi
done
if [ -z "$nvcc" ]; then
	skip "no nvcc on this machine: contrib/examples/vector_add was not compiled"
else
	tar cf - -C contrib/examples/vector_add . |
		rai submit --gpus 1 -- "$nvcc -O2 -o vector_add /src/vector_add.cu && ./vector_add" >"$dir/cuda" 2>"$dir/cuda.err"
	verdict $? "contrib/examples/vector_add: $(tail -1 "$dir/cuda")" "contrib/examples/vector_add did not run" "$dir/cuda" "$dir/cuda.err"
fi

# After all that the runners are still well. What is left of a job is looked for when
# its result is out: give it a moment.
sleep 5
rai runners >"$dir/runners" 2>&1
grep -q 'idle' "$dir/runners" && ! grep -q 'sick' "$dir/runners"
verdict $? "every runner is well" "a runner is sick" "$dir/runners"
exit "$failed"
