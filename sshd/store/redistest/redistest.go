// Package redistest gives tests a redis-server of their own, which they may stop, kill and
// start again.
package redistest

import (
	"bufio"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// A Server listens on a socket in a folder of its own, until the test ends.
type Server struct {
	t    testing.TB
	dir  string
	args []string
	cmd  *exec.Cmd
}

// Start starts a server that is durable and has no snapshots; args, those of redis-server,
// change that. The test is skipped where Redis is not installed, and fails in CI.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "redis") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := StartPlain(t, append([]string{"--port", "0", "--unixsocket", filepath.Join(dir, "s"), "--dir", dir,
		"--save", "", "--appendonly", "yes", "--appendfsync", "always"}, args...)...)
	s.dir = dir
	return s
}

// StartPlain is Start with no arguments but args: of a Sentinel, say.
func StartPlain(t testing.TB, args ...string) *Server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("RAID_CI") != "" {
			t.Fatal("redis-server is missing: ", err)
		}
		t.Skip("redis-server is missing: ", err)
	}
	s := &Server{t: t, args: args}
	s.Restart()
	t.Cleanup(s.Kill)
	return s
}

// ready is what a server says at a port or at a socket, and a Sentinel.
var ready = regexp.MustCompile(`(?i)ready to accept connections|Sentinel ID is`)

// Restart starts a killed server again with what it had, and waits until it has read that.
func (s *Server) Restart() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.args...)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	var all []string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		all = append(all, lines.Text())
		if ready.MatchString(lines.Text()) {
			go func() { // ends with the server
				for lines.Scan() {
				}
			}()
			return
		}
	}
	s.t.Fatalf("redis-server did not start:\n%s", strings.Join(all, "\n"))
}

// Port returns a port of host that nobody listens at, and that nobody else is given either:
// it is none of those that the kernel chooses for whoever has no wish, and ten thousand
// below them, where a node of a cluster listens, too.
func Port(t testing.TB, host string) string {
	t.Helper()
	for {
		port := strconv.Itoa(10_000 + rand.IntN(12_000)) // net.ipv4.ip_local_port_range begins at 32,768
		l, err := net.Listen("tcp", net.JoinHostPort(host, port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		return port
	}
}

// Signal sends a signal: STOP and CONT, above all.
func (s *Server) Signal(sig syscall.Signal) { s.cmd.Process.Signal(sig) }

// Kill kills the server, as kill -9 does.
func (s *Server) Kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// Dir is its folder, if Start started it.
func (s *Server) Dir() string { return s.dir }

// Socket is where it listens.
func (s *Server) Socket() string { return filepath.Join(s.dir, "s") }

// URL names it, with parameters a=b or none.
func (s *Server) URL(params ...string) string {
	return "unix://" + s.Socket() + "?" + strings.Join(params, "&")
}
