package stream

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/sshd/store/redistest"
)

// A server is a redis-server of the test's own.
type server struct {
	t    testing.TB
	addr string
	cmd  *exec.Cmd
	db   *redis.Client
}

// startRedis starts a redis-server. In args DIR is a folder of its own.
func startRedis(t testing.TB, args ...string) *server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("RAID_CI") == "1" {
			t.Fatal("redis-server is missing: ", err)
		}
		t.Skip("redis-server is missing: ", err)
	}
	s := &server{t: t, addr: "127.0.0.1:" + redistest.Port(t, "127.0.0.1")}
	s.start(args...)
	s.db = redis.NewClient(&redis.Options{Addr: s.addr, DisableIdentity: true})
	t.Cleanup(func() {
		s.db.Close()
		s.kill()
	})
	return s
}

func (s *server) start(args ...string) {
	s.t.Helper()
	_, port, _ := net.SplitHostPort(s.addr)
	s.cmd = exec.Command("redis-server", append([]string{"--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", s.t.TempDir()}, args...)...)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "Ready to accept connections") {
			go func() { // ends with the server
				for lines.Scan() {
				}
			}()
			return
		}
	}
	s.t.Fatal("redis-server did not start")
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

func (s *server) url() string { return "redis://" + s.addr }

// last waits for the entry that ends a job's stream, and returns all entries.
func (s *server) last(id int64) []redis.XMessage {
	s.t.Helper()
	s.end(id, 0)
	all, err := s.db.XRange(s.t.Context(), fmt.Sprint(logKey, id), "-", "+").Result()
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// end waits for that entry, which comes after the offset at.
func (s *server) end(id, at int64) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	key, from := fmt.Sprint(logKey, id), fmt.Sprint(at)
	for {
		got, err := s.db.XRead(ctx, &redis.XReadArgs{Streams: []string{key, from}, Block: 30 * time.Second}).Result()
		if err != nil {
			s.t.Fatalf("waiting for the end of %s: %v", key, err)
		}
		for _, e := range got[0].Messages {
			from = e.ID
			if e.Values["s"] == "end" {
				return
			}
		}
	}
}

// A diary keeps what a mirror says, and rings for each line.
type diary struct {
	mu    sync.Mutex
	lines []string
	bell  chan struct{}
}

func (d *diary) logf(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
	close(d.bell)
	d.bell = make(chan struct{})
}

// await waits until n lines were said, and returns them.
func (d *diary) await(t testing.TB, n int) []string {
	t.Helper()
	limit := time.After(30 * time.Second)
	for {
		d.mu.Lock()
		lines, bell := d.lines, d.bell
		d.mu.Unlock()
		if len(lines) >= n {
			return lines
		}
		select {
		case <-bell:
		case <-limit:
			t.Fatalf("said %q, want %d lines", lines, n)
		}
	}
}

// runMirror runs a mirror until the test ends or stop is called.
func runMirror(t testing.TB, s *Spools, o MirrorOptions) (m *Mirror, d *diary, stop func()) {
	t.Helper()
	d = &diary{bell: make(chan struct{})}
	o.Logf = d.logf
	m, err := NewMirror(o, s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { m.Run(ctx) })
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return m, d, stop
}
