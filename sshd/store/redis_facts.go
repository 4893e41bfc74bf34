package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// RedisFacts are what a Redis says of itself. What its ACL forbids to ask is "" or 0, and
// named in Hidden.
type RedisFacts struct {
	Version   string        // "7.0.15": what Redis it is, or is like
	Server    string        // "redis" or "valkey"
	Mode      string        // "standalone", "sentinel" or "cluster"
	AOF       bool          // writes are appended to a file
	Fsync     string        // appendfsync: "always", "everysec" or "no"
	WaitsAOF  bool          // a commit can wait for the disk whatever Fsync is (7.2)
	Eviction  string        // maxmemory-policy
	Used      int64         // bytes of memory
	MaxMemory int64         // bytes; 0 for no bound
	Replicas  int           // connected ones
	Latency   time.Duration // of a PING, the median of some
	Forgets   bool          // what was committed is lost when it starts again: see askDefault
	Hidden    []string      // what may not be asked: "INFO", "CONFIG", "ACL DRYRUN"
}

// ExamineRedis asks a Redis for its facts. It writes nothing there. ctx bounds it.
func ExamineRedis(ctx context.Context, url string) (RedisFacts, error) {
	p, err := parseRedisURL(url)
	if err != nil {
		return RedisFacts{}, err
	}
	c := p.dial()
	defer c.Close()
	return examine(ctx, c, keyspace("{"+p.name+"}:"))
}

// pings is how many measure the latency.
const pings = 5

func examine(ctx context.Context, c redis.UniversalClient, space keyspace) (f RedisFacts, err error) {
	one, err := serverOf(ctx, c, space)
	if err != nil {
		return f, err
	}
	var times []time.Duration
	for range pings {
		start := time.Now()
		if err := one.Ping(ctx).Err(); err != nil {
			return f, fmt.Errorf("ping: %w", err)
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	f.Latency = times[pings/2]
	if err := f.askInfo(ctx, one); err != nil {
		return f, err
	}
	if err := f.askConfig(ctx, one); err != nil {
		return f, err
	}
	if err := f.askDefault(ctx, one, space); err != nil {
		return f, err
	}
	// It is an unknown command before 7.2, and asks for nothing here.
	switch err := one.Do(ctx, "WAITAOF", 0, 0, 1).Err(); {
	case err == nil:
		f.WaitsAOF = true
	case !errors.As(err, new(redis.Error)):
		return f, err
	}
	return f, nil
}

// serverOf returns the client of the one server that has the deployment.
func serverOf(ctx context.Context, c redis.UniversalClient, space keyspace) (redis.UniversalClient, error) {
	cluster, ok := c.(*redis.ClusterClient)
	if !ok {
		return c, nil
	}
	return cluster.MasterForKey(ctx, space.meta())
}

// mayNot notes what may not be asked, and passes every other error.
func (f *RedisFacts) mayNot(what string, err error) error {
	if err != nil && errors.As(err, new(redis.Error)) && !redis.HasErrorPrefix(err, "LOADING") &&
		!redis.HasErrorPrefix(err, "NOAUTH") && !redis.HasErrorPrefix(err, "WRONGPASS") {
		f.Hidden = append(f.Hidden, what)
		return nil
	}
	return err
}

func (f *RedisFacts) askInfo(ctx context.Context, c redis.UniversalClient) error {
	text, err := c.Info(ctx).Result()
	if err != nil {
		return f.mayNot("INFO", err)
	}
	info := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[name] = value
		}
	}
	f.Version, f.Server, f.Mode = info["redis_version"], info["server_name"], info["redis_mode"]
	if f.Server == "" {
		f.Server = "redis"
	}
	f.AOF, f.Eviction = info["aof_enabled"] == "1", info["maxmemory_policy"]
	f.Used, _ = strconv.ParseInt(info["used_memory"], 10, 64)
	f.MaxMemory, _ = strconv.ParseInt(info["maxmemory"], 10, 64)
	f.Replicas, _ = strconv.Atoi(info["connected_slaves"])
	return nil
}

func (f *RedisFacts) askConfig(ctx context.Context, c redis.UniversalClient) error {
	all, err := c.ConfigGet(ctx, "append*").Result()
	if err != nil {
		return f.mayNot("CONFIG", err)
	}
	f.Fsync = all["appendfsync"]
	f.AOF = f.AOF || all["appendonly"] == "yes"
	return nil
}

// askDefault asks what the user default may do. As that user, even when nobody can log in
// as it, Redis and Valkey read their file when they start, and what it may not do they leave
// out of each transaction: redis/redis#14541, valkey-io/valkey#3983. Commits are transactions.
func (f *RedisFacts) askDefault(ctx context.Context, c redis.UniversalClient, space keyspace) error {
	said, err := c.Do(ctx, "ACL", "DRYRUN", "default", "HSET", space.meta(), "field", "value").Text()
	if err != nil {
		return f.mayNot("ACL DRYRUN", err)
	}
	f.Forgets = said != "OK"
	return nil
}

func (f *RedisFacts) hides(what string) bool { return slices.Contains(f.Hidden, what) }

// known reports whether it could be asked whether writes are appended to a file.
func (f *RedisFacts) known() bool { return !f.hides("INFO") || !f.hides("CONFIG") }

// waits reports whether commits wait for the disk by themselves.
func (f *RedisFacts) waits() bool {
	return f.WaitsAOF && f.AOF && f.Fsync != "always" && f.Mode != "cluster"
}

// old returns an error for a Redis that lacks what is needed.
func (f *RedisFacts) old() error {
	major, _, _ := strings.Cut(f.Version, ".")
	if n, err := strconv.Atoi(major); err == nil && n < 7 {
		return fmt.Errorf("redis %s is too old: 7.0 is needed", f.Version)
	}
	return nil
}

// Judge returns what keeps a Redis from being a store as its URL asks, and what it could do
// better.
func (f *RedisFacts) Judge(url string) (errs, warnings []error) {
	p, err := parseRedisURL(url)
	if err != nil {
		return []error{err}, nil
	}
	if err := f.old(); err != nil {
		return []error{err}, nil
	}
	return f.judge(p.durability)
}

func (f *RedisFacts) judge(durability string) (errs, warnings []error) {
	must := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if durability == durableNone {
		must = func(format string, args ...any) { warnings = append(warnings, fmt.Errorf(format, args...)) }
	}
	should := func(format string, args ...any) { warnings = append(warnings, fmt.Errorf(format, args...)) }
	const unless = "; or say durability=none in its URL"
	hidden := f.hides("INFO") || f.hides("CONFIG")
	switch {
	case f.known() && !f.AOF:
		must("what it took is lost when it ends, for appendonly is off: CONFIG SET appendonly yes, and in redis.conf" + unless)
	case hidden && durability == durableAlways && f.Fsync == "":
		must("it may not be asked how durable it is, and durability=always wants to know: let the user run INFO and CONFIG GET" + unless)
	case hidden:
		should("not all could be asked about how durable it is, for the user may not run %s", strings.Join(f.Hidden, " and "))
	case f.Fsync == "always" || f.waits():
	case durability == durableAlways:
		must("a commit is not on the disk when it is acknowledged, for appendfsync is %s: CONFIG SET appendfsync always"+unless, f.Fsync)
	case f.Fsync == "no":
		should("a power cut loses half a minute or more, for appendfsync is no: CONFIG SET appendfsync always")
	default:
		should("a power cut loses a second or two, for appendfsync is %s: CONFIG SET appendfsync always", f.Fsync)
	}
	const allow = "`user default off ~* &* +@all` in its ACL; nobody can log in as it then, either"
	switch {
	case f.Forgets && (f.AOF || !f.known()):
		should("jobs are lost when it starts again, for it reads its file as the user default, who may not write: say " + allow)
	case f.AOF && !hidden && f.hides("ACL DRYRUN"):
		should("it may not be asked whether it finds the jobs again when it starts, which the user default must be allowed: let the user run +acl|dryrun, or see that default is on, or " + allow)
	}
	switch {
	case strings.HasPrefix(f.Eviction, "allkeys"):
		must("it may throw jobs away, for maxmemory-policy is %s: CONFIG SET maxmemory-policy noeviction, and in redis.conf"+unless, f.Eviction)
	case f.Eviction != "" && f.Eviction != "noeviction":
		should("when it is full it forgets who leads, for maxmemory-policy is %s: CONFIG SET maxmemory-policy noeviction", f.Eviction)
	}
	return errs, warnings
}
