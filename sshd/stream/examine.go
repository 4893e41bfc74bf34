package stream

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/rai-project/raid/sshd/store"
)

// RedisFacts are what a Redis says of itself. What an ACL keeps it from saying is zero.
type RedisFacts struct {
	Version   string // "7.0.15"
	MaxMemory string // bytes; "0" for no bound, "" if it may not be asked
	Used      int64  // bytes
	Eviction  string // maxmemory-policy, "" if it may not be asked
	AOF       bool   // writes survive its end
}

// ExamineRedis asks the Redis that a URL names for its facts. It writes nothing there.
// ctx bounds it.
func ExamineRedis(ctx context.Context, url string) (f RedisFacts, err error) {
	c, err := store.DialRedis(url, 3*callTimeout, 1)
	if err != nil {
		return f, err
	}
	defer c.Close()
	if err := c.Ping(ctx).Err(); err != nil {
		return f, fmt.Errorf("ping: %w", err)
	}
	if info, err := c.Info(ctx, "server").Result(); err == nil { // an ACL may forbid it
		f.Version = infoValue(info, "redis_version")
	}
	if info, err := c.Info(ctx, "memory").Result(); err == nil {
		f.MaxMemory, f.Eviction, f.Used = infoValue(info, "maxmemory"), infoValue(info, "maxmemory_policy"), infoNumber(info, "used_memory")
	}
	if info, err := c.Info(ctx, "persistence").Result(); err == nil {
		f.AOF = infoValue(info, "aof_enabled") == "1"
	}
	return f, nil
}

// infoValue reads "name:value" out of INFO's text.
func infoValue(info, name string) string {
	for line := range strings.Lines(info) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), ":"); k == name {
			return v
		}
	}
	return ""
}

func infoNumber(info, name string) int64 {
	n, _ := strconv.ParseInt(infoValue(info, name), 10, 64)
	return n
}
