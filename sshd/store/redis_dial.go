package store

import (
	"errors"
	"time"

	"github.com/redis/go-redis/v9"
)

// DialRedis returns a client of the Redis that a URL of [RedisOptions] names, for others
// than a store: name and durability are refused. It speaks to nobody yet. Nothing is tried
// twice, each step of a call takes at most timeout, and a deadline of a context holds.
// Errors do not tell the password.
func DialRedis(url string, timeout time.Duration, conns int) (redis.UniversalClient, error) {
	p, err := parseRedisURL(url)
	if err != nil {
		return nil, err
	}
	if p.name != "rai" || p.durability != durableAuto {
		return nil, errors.New("name and durability in the URL of Redis are for [queue] store only")
	}
	p.opts.DialTimeout, p.opts.ReadTimeout, p.opts.WriteTimeout, p.opts.PoolTimeout = timeout, timeout, timeout, timeout
	p.opts.PoolSize = conns
	return p.dial(), nil
}
