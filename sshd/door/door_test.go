package door

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
)

// patience bounds what must happen soon; reaching it is a failure.
const patience = 20 * time.Second

// A house is a server on loopback with two people enrolled.
type house struct {
	*Server
	addr  string
	front *house     // another raid's door that clients come through; nil for none
	ada   ssh.Signer // enrolled as ada
	bob   ssh.Signer // enrolled as bob
	mu    sync.Mutex
	log   []string
}

// open starts a house. What cfg leaves out gets a default that suits tests.
func open(t testing.TB, cfg Config) *house {
	t.Helper()
	if throughAnother {
		return openTwo(t, cfg)
	}
	h := build(t, cfg)
	h.listen(t)
	return h
}

func (h *house) listen(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.serve(t, l)
	h.addr = l.Addr().String()
}

func build(t testing.TB, cfg Config) *house {
	t.Helper()
	h := &house{ada: dialtest.Signer(t), bob: dialtest.Signer(t)}
	if cfg.HostKeys == nil {
		cfg.HostKeys = []ssh.Signer{dialtest.Signer(t)}
	}
	if cfg.Authorize == nil {
		cfg.Authorize = h.enrolled
	}
	if cfg.Handle == nil {
		cfg.Handle = func(ctx context.Context, s *Session) int { return 0 }
	}
	cfg.Logf = h.logf
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.Server = srv
	return h
}

func (h *house) serve(t testing.TB, l net.Listener) {
	served := make(chan error, 1)
	go func() { served <- h.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := h.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown() = %v, want nil", err)
		}
		if err := <-served; err != ErrClosed {
			t.Errorf("Serve() = %v, want %v", err, ErrClosed)
		}
	})
}

// enrolled is the house's Authorize: two people, everybody else is a guest.
func (h *house) enrolled(_ context.Context, key ssh.PublicKey, _ netip.AddrPort) (keys.Identity, error) {
	h.mu.Lock()
	people := map[string]ssh.Signer{"ada": h.ada, "bob": h.bob}
	h.mu.Unlock()
	for user, k := range people {
		if bytes.Equal(k.PublicKey().Marshal(), key.Marshal()) {
			return keys.Identity{User: user, Role: keys.Student}, nil
		}
	}
	return keys.Identity{Role: keys.Guest}, nil
}

func (h *house) logf(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.log = append(h.log, fmt.Sprintf(format, args...))
}

func (h *house) logged() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	log := strings.Join(h.log, "\n")
	if h.front != nil { // clients log in there
		log += h.front.logged()
	}
	return log
}

func clientConfig(user string, key ...ssh.Signer) *ssh.ClientConfig {
	return &ssh.ClientConfig{User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key...)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: patience}
}

func (h *house) dial(t testing.TB, key ...ssh.Signer) *ssh.Client {
	t.Helper()
	client, err := ssh.Dial("tcp", h.addr, clientConfig("rai", key...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

func session(t testing.TB, client *ssh.Client) *ssh.Session {
	t.Helper()
	s, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// exitStatus is the status in err, as session.Run and Wait return it.
func exitStatus(t testing.TB, err error) int {
	t.Helper()
	var exit *ssh.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitStatus()
	}
	t.Fatalf("session ended with %v, want an exit status", err)
	return -1
}

// receive waits for a value.
func receive[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

// tool finds a program, or skips the test where there is none.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
	case os.Getenv("RAID_CI") == "1":
		t.Fatalf("%s is missing", name)
	default:
		t.Skipf("%s is missing", name)
	}
	return path
}

func TestSession(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		in, _ := io.ReadAll(s)
		fmt.Fprintf(s, "%s %s %q %q", s.Who.User, s.User, s.Command, in)
		fmt.Fprintf(s.Stderr(), "%v %v", s.Shell, s.Env("GIT_PROTOCOL"))
		return 42
	}})
	s := session(t, h.dial(t, h.ada))
	var out, errs strings.Builder
	s.Stdin, s.Stdout, s.Stderr = strings.NewReader("tar"), &out, &errs
	if err := s.Setenv("GIT_PROTOCOL", "version=2"); err != nil {
		t.Fatal(err)
	}
	if got := exitStatus(t, s.Run("submit -- make 'a b'")); got != 42 {
		t.Errorf("exit status = %d, want 42", got)
	}
	if got, want := out.String(), `ada rai "submit -- make 'a b'" "tar"`; got != want {
		t.Errorf("stdout = %s, want %s", got, want)
	}
	if got, want := errs.String(), "false version=2"; got != want {
		t.Errorf("stderr = %s, want %s", got, want)
	}
}

func TestShell(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		fmt.Fprintf(s, "%v %q", s.Shell, s.Command)
		return 0
	}})
	s := session(t, h.dial(t, h.ada))
	var out strings.Builder
	s.Stdout = &out
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), `true ""`; got != want {
		t.Errorf("shell: %s, want %s", got, want)
	}
}

// The client has the status before it sees EOF, and all output before the status.
func TestFrameOrder(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 1<<20)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		s.Write(big)
		return 7
	}})
	for range 20 {
		ch, reqs, err := h.dial(t, h.ada).OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ C string }{"x"})); !ok || err != nil {
			t.Fatalf("exec: %v, %v", ok, err)
		}
		out, err := io.ReadAll(ch) // ends at EOF
		if err != nil || len(out) != len(big) {
			t.Fatalf("output: %d bytes, %v; want %d", len(out), err, len(big))
		}
		select {
		case r := <-reqs:
			if r == nil || r.Type != "exit-status" || !bytes.Equal(r.Payload, []byte{0, 0, 0, 7}) {
				t.Fatalf("before EOF: %+v, want exit-status 7", r)
			}
		default:
			t.Fatal("EOF came before the exit status")
		}
		if r, ok := <-reqs; ok {
			t.Fatalf("after EOF: %+v, want close", r)
		}
		ch.Close()
	}
}

// The client's stdin stays open and full; the session ends all the same.
func TestStdinNotWaitedFor(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { return 3 }})
	s := session(t, h.dial(t, h.ada))
	in, _ := s.StdinPipe()
	go io.Copy(in, zeros{})
	if got := exitStatus(t, s.Run("x")); got != 3 {
		t.Errorf("exit status = %d, want 3", got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestPTY(t *testing.T) {
	ready, resized := make(chan bool), make(chan string, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		p, ok := s.PTY()
		w, hgt := p.Size()
		fmt.Fprintf(s, "%v %s %d %d\n", ok, p.Term, w, hgt)
		fmt.Fprint(s.Stderr(), "a\nb\r\nc\r")
		fmt.Fprint(s.Stderr(), "\nd\n")
		close(ready)
		<-s.Resized()
		w, hgt = p.Size()
		resized <- fmt.Sprint(w, hgt)
		s.Raw()
		fmt.Fprint(s, "raw\n")
		return 0
	}})
	s := session(t, h.dial(t, h.ada))
	var out, errs bytes.Buffer
	s.Stdout, s.Stderr = &out, &errs
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	receive(t, ready, "session")
	s.WindowChange(50, 132)
	if got, want := receive(t, resized, "resize"), "132 50"; got != want {
		t.Errorf("size after resize = %s, want %s", got, want)
	}
	if err := s.Wait(); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "true xterm 80 24\r\nraw\n"; got != want {
		t.Errorf("stdout = %q, want %q", got, want)
	}
	if got, want := errs.String(), "a\r\nb\r\nc\r\nd\r\n"; got != want {
		t.Errorf("stderr = %q, want %q", got, want)
	}
}

func TestSignals(t *testing.T) {
	got := make(chan string, 8)
	for _, watch := range []bool{true, false} {
		h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
			if watch {
				s.WatchKeys()
				s.WatchKeys()
				if _, err := s.Read(make([]byte, 1)); err != errKeysWatched {
					t.Errorf("Read after WatchKeys: %v, want %v", err, errKeysWatched)
				}
			} else {
				var p [8]byte
				n, _ := s.Read(p[:])
				got <- fmt.Sprintf("%q", p[:n])
			}
			got <- <-s.Signals()
			got <- <-s.Signals()
			return 0
		}})
		s := session(t, h.dial(t, h.ada))
		in, _ := s.StdinPipe()
		s.RequestPty("xterm", 24, 80, nil)
		if err := s.Start("x"); err != nil {
			t.Fatal(err)
		}
		io.WriteString(in, "ab\x03")
		want := []string{"INT", "TERM"}
		if !watch {
			want = append([]string{`"ab\x03"`}, want...)
		}
		for i, w := range want {
			if i == len(want)-1 {
				s.Signal(ssh.SIGUSR1) // of no interest
				s.Signal(ssh.SIGTERM)
			}
			if g := receive(t, got, "signal"); g != w {
				t.Errorf("watch %v: got %s, want %s", watch, g, w)
			}
		}
		if err := s.Wait(); err != nil {
			t.Errorf("session ended with %v", err)
		}
	}
}

// Nothing can be written once the handler has returned, even by a goroutine it left.
func TestWriteAfterEnd(t *testing.T) {
	left := make(chan *Session, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { left <- s; return 0 }})
	s := session(t, h.dial(t, h.ada))
	if err := s.Run("x"); err != nil {
		t.Fatal(err)
	}
	if _, err := (<-left).Write([]byte("late")); err != errSessionOver {
		t.Errorf("Write after the end: %v, want %v", err, errSessionOver)
	}
}

// A client that closes its stdout, as head does to ssh, makes writes fail.
func TestClosedOutput(t *testing.T) {
	got := make(chan error, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		for {
			if _, err := s.Write(make([]byte, 1024)); err != nil {
				got <- err
				fmt.Fprint(s.Stderr(), "bye")
				return 1
			}
		}
	}})
	s := session(t, h.dial(t, h.ada))
	var errs strings.Builder
	s.Stdout, s.Stderr = io.Discard, &errs
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	s.SendRequest("eow@openssh.com", false, nil)
	if err := receive(t, got, "error"); err != ErrNoOutput {
		t.Errorf("Write() = %v, want %v", err, ErrNoOutput)
	}
	s.Wait()
	if errs.String() != "bye" {
		t.Errorf("stderr = %q, want bye", errs.String())
	}
}

// causes runs a session, has the client do something, and returns the cause that the
// session's context ended with.
func causes(t *testing.T, do func(h *house, c *ssh.Client, s *ssh.Session)) error {
	t.Helper()
	running, cause := make(chan bool, 1), make(chan error, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		running <- true
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return 1
	}})
	c := h.dial(t, h.ada)
	s := session(t, c)
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	receive(t, running, "session")
	do(h, c, s)
	return receive(t, cause, "end")
}

func TestCauses(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(h *house, c *ssh.Client, s *ssh.Session)
		want error
	}{
		{"channel closed", func(h *house, c *ssh.Client, s *ssh.Session) { s.Close() }, ErrLeft},
		{"channel closed, then hung up", func(h *house, c *ssh.Client, s *ssh.Session) { s.Close(); c.Close() }, ErrLeft},
		{"hung up", func(h *house, c *ssh.Client, s *ssh.Session) { c.Close() }, ErrLost},
		{"shutdown", func(h *house, c *ssh.Client, s *ssh.Session) { go h.Shutdown(t.Context()) }, ErrShutdown},
		{"revoked", func(h *house, c *ssh.Client, s *ssh.Session) {
			h.Close(ssh.FingerprintSHA256(h.bob.PublicKey()))
			h.Close(ssh.FingerprintSHA256(h.ada.PublicKey()))
		}, ErrRevoked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range 10 {
				if got := causes(t, tt.do); got != tt.want {
					t.Fatalf("cause = %v, want %v", got, tt.want)
				}
			}
		})
	}
}

// A revoked key's connection takes no new sessions and is cut.
func TestRevokedConnection(t *testing.T) {
	h := open(t, Config{})
	c := h.dial(t, h.ada)
	if err := session(t, c).Run("x"); err != nil {
		t.Fatal(err)
	}
	h.Close(ssh.FingerprintSHA256(h.ada.PublicKey()))
	c.Wait()
	if _, err := c.NewSession(); err == nil {
		t.Error("a revoked key's connection still takes sessions")
	}
}

func TestShutdownCuts(t *testing.T) {
	running, release := make(chan bool, 1), make(chan bool)
	h := build(t, Config{Handle: func(ctx context.Context, s *Session) int {
		running <- true
		<-release // looks at nothing
		return 0
	}})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go h.Serve(l)
	h.addr = l.Addr().String()
	c := h.dial(t, h.ada)
	session(t, c).Start("x")
	receive(t, running, "session")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.Shutdown(ctx); err == nil {
		t.Error("Shutdown() = nil while a handler runs, want an error")
	}
	c.Wait() // the connection is gone
	close(release)
	if err := h.Shutdown(t.Context()); err != nil {
		t.Errorf("second Shutdown() = %v, want nil", err)
	}
	if err := h.Serve(l); err != ErrClosed {
		t.Errorf("Serve after Shutdown = %v, want %v", err, ErrClosed)
	}
}
