#!/bin/sh
# Starts one part in its container: gives it its secrets, then goes on as its own user.
set -eu
as() { u=$1; shift; exec setpriv --reuid "$u" --regid "$u" --init-groups "$@"; }
own() { install -d -m 700 -o "$1" -g "$1" "$2"; }

case $1 in
raid)
	own raid /var/lib/raid
	for f in host_key host_key.pub admin admin.pub raid.toml; do
		install -m 600 -o raid -g raid /secret/$f /var/lib/raid/
	done
	as raid raid serve --config /var/lib/raid/raid.toml --state /var/lib/raid
	;;
redis)
	own redis /data
	install -m 600 -o redis -g redis /secret/users.acl /data/
	as redis redis-server /etc/raid/redis.conf
	;;
s3)
	own raid /data
	mkdir -p /data/raid && chown raid: /data/raid # the bucket
	. /secret/s3.env
	export ROOT_ACCESS_KEY ROOT_SECRET_KEY
	as raid versitygw --port :7070 --quiet posix /data
	;;
runner-*)
	# A box has a /proc of its own, which the kernel allows where none of it is hidden.
	for m in $(awk '$2 ~ "^/proc/." {print $2}' /proc/mounts); do umount "$m"; done
	exec raid runner --server rai@raid-a:2222 --server rai@raid-b:2222 --name "$1" \
		-i /secret/runner-"$1" --known-hosts /secret/known_hosts --state /var/lib/raid
	;;
esac
