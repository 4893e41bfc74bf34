package store_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// A redisServer is a redis-server of the test's own, and what tests of a store do with it.
type redisServer struct {
	*redistest.Server
	t testing.TB
}

// startRedis starts one that keeps its promises; args change that.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	return &redisServer{redistest.Start(t, args...), t}
}

func (s *redisServer) start()                    { s.t.Helper(); s.Restart() }
func (s *redisServer) signal(sig syscall.Signal) { s.Signal(sig) }
func (s *redisServer) kill()                     { s.Kill() }

// url names it, with parameters a=b&c=d or none.
func (s *redisServer) url(params ...string) string { return s.URL(params...) }

// client is go-redis's own.
func (s *redisServer) client() *redis.Client {
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: s.Socket(), DisableIdentity: true})
	s.t.Cleanup(func() { c.Close() })
	return c
}

// open opens a store to read.
func (s *redisServer) open(params ...string) *store.Redis {
	s.t.Helper()
	r, err := store.OpenRedis(context.Background(), store.RedisOptions{URL: s.url(params...)})
	if err != nil {
		s.t.Fatalf("OpenRedis = %v", err)
	}
	s.t.Cleanup(func() { r.Close() })
	return r
}

// writer opens a store to write.
func (s *redisServer) writer(params ...string) *store.Redis {
	s.t.Helper()
	r := s.open(params...)
	if err := r.Claim(context.Background(), nil); err != nil {
		s.t.Fatalf("Claim = %v", err)
	}
	return r
}

var names atomic.Int64

// newName is a deployment that nobody else uses.
func newName() string { return fmt.Sprintf("name=t%d", names.Add(1)) }

// soon bounds what a test waits for.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}
