#!/bin/sh
# Installs what the demo and the tests use, where that is possible; else says what is
# missing. Nothing is done when everything is there.
set -eu
missing=
need() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
PATH=$PATH:/usr/sbin:/sbin
need bwrap bubblewrap
need dockerd docker.io
need docker-registry docker-registry
need ssh openssh-client
need sshd openssh-server
need redis-server redis-server
need git git
need cc gcc
need make make
need mkfs.ext4 e2fsprogs
need zstd zstd
need bsdtar libarchive-tools
need zip zip
need python3 python3
/usr/bin/python3 -c 'import redis' 2>/dev/null || missing="$missing python3-redis" # reads the mirror
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
	echo "raid: installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	# Services that come with the packages are not wanted, only their programs.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod +x $policy
		trap 'rm -f $policy' EXIT
	fi
	apt-get -qq update
	# shellcheck disable=SC2086
	apt-get -qq -y --no-install-recommends install $missing >/dev/null
else
	echo "raid: please install:$missing" >&2
	exit 1
fi
