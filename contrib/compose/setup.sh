#!/bin/sh
# Makes the secrets of a deployment in secret/, once: the keys that all raids share, those
# of the runners, the passwords of Redis and of the bucket.
set -eu
cd "$(dirname "$0")"
[ ! -e secret ] || { echo "secret/ is there already"; exit 0; }
umask 077
mkdir secret.new
cd secret.new
for k in host_key admin runner-runner-1 runner-runner-2; do
	ssh-keygen -q -t ed25519 -N '' -C "raid $k" -f $k
done
for h in raid-a raid-b; do
	echo "[$h]:2222 $(cut -d' ' -f1,2 host_key.pub)"
done >known_hosts
word() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
redis=$(word) key=$(word) secret=$(word)
sed "s/PASSWORD/$redis/" ../users.acl >users.acl
sed "s/PASSWORD/$redis/; s/KEY/$key/; s/SECRET/$secret/" ../raid.toml >raid.toml
printf 'ROOT_ACCESS_KEY=%s\nROOT_SECRET_KEY=%s\n' "$key" "$secret" >s3.env
mv ../secret.new ../secret
