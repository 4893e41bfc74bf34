package dial

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/keys/dial/dialtest"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

func TestParse(t *testing.T) {
	for _, c := range []struct{ in, user, addr string }{
		{"rai@127.0.0.1:2222", "rai", "127.0.0.1:2222"},
		{"gpu.example.edu", "rai", "gpu.example.edu:2222"},
		{"ada@gpu", "ada", "gpu:2222"},
		{"gpu:22", "rai", "gpu:22"},
		{"ssh://rai@gpu:22/", "rai", "gpu:22"},
		{"[::1]:2200", "rai", "[::1]:2200"},
		{"rai@[::1]", "rai", "[::1]:2222"},
		{"::1", "rai", "[::1]:2222"},
	} {
		got, err := Parse(c.in)
		if err != nil || got.User != c.user || got.Addr != c.addr {
			t.Errorf("Parse(%q) = %q %q, %v, want %q %q", c.in, got.User, got.Addr, err, c.user, c.addr)
		}
	}
	for _, in := range []string{"", "@", "rai@", "@gpu", "gpu:", "gpu:0", "gpu:65536", "gpu:x", "-oProxyCommand=x", "a b", "rai@gpu/lab", "gpu\n", "[::1", "rai@\x1b[2J"} {
		if got, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %q, want an error", in, got.Addr)
		}
	}
}

func target(s *dialtest.Server) Target {
	return Target{Addr: s.Addr, Signers: []ssh.Signer{s.Client}, HostKeys: []string{dialtest.Line(s.Host)}}
}

func connect(t testing.TB, s *dialtest.Server) *Client {
	t.Helper()
	c, err := Dial(t.Context(), target(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestRun(t *testing.T) {
	s := dialtest.Serve(t, func(cmd string, ch ssh.Channel) {
		in, _ := io.ReadAll(ch)
		fmt.Fprintf(ch, "out %s %d", cmd, len(in))
		fmt.Fprint(ch.Stderr(), "err")
		dialtest.Exit(ch, 42)
	})
	c := connect(t, s)
	for range 3 { // several sessions on one connection
		var out, errs bytes.Buffer
		code, err := c.Run(t.Context(), "submit -q a", bytes.NewReader(make([]byte, 5<<20)), &out, &errs)
		if code != 42 || err != nil || out.String() != "out submit -q a 5242880" || errs.String() != "err" {
			t.Fatalf("Run = %d, %v, out %q, err %q", code, err, &out, &errs)
		}
	}
	if code, err := c.Run(t.Context(), "x", nil, nil, nil); code != 42 || err != nil {
		t.Errorf("Run without streams = %d, %v, want 42", code, err)
	}
}

// A command that ends before its input does must not be waited for.
func TestRunEarlyEnd(t *testing.T) {
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) { dialtest.Exit(ch, 126) })
	c := connect(t, s)
	r, w := io.Pipe()
	defer w.Close()
	if code, err := c.Run(t.Context(), "submit", r, nil, nil); code != 126 || err != nil {
		t.Errorf("Run = %d, %v, want 126", code, err)
	}
}

// Half an input must never look like the whole.
func TestRunBrokenInput(t *testing.T) {
	eof := make(chan bool, 1)
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) {
		io.Copy(io.Discard, ch)
		_, err := ch.SendRequest("ping", true, nil) // fails once the client has closed the channel
		eof <- err == nil
		dialtest.Exit(ch, 0)
	})
	c := connect(t, s)
	broken := errors.New("disk on fire")
	_, err := c.Run(t.Context(), "submit", io.MultiReader(strings.NewReader("half"), failing{broken}), nil, nil)
	if !errors.Is(err, broken) {
		t.Errorf("Run = %v, want %v", err, broken)
	}
	if <-eof {
		t.Error("the server saw a clean end of the input")
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error)  { return 0, f.err }
func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestRunBrokenOutput(t *testing.T) {
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) {
		fmt.Fprint(ch, "result")
		fmt.Fprint(ch.Stderr(), "result")
		dialtest.Exit(ch, 0)
	})
	full := errors.New("disk full")
	if code, err := connect(t, s).Run(t.Context(), "output 1", nil, failing{full}, nil); !errors.Is(err, full) {
		t.Errorf("Run = %d, %v, want %v", code, err, full)
	}
	if code, err := connect(t, s).Run(t.Context(), "output 1", nil, nil, failing{full}); !errors.Is(err, full) {
		t.Errorf("Run = %d, %v, want %v", code, err, full)
	}
}

// Ctrl-C must reach raid as a deliberate end, or the job goes on.
func TestCancelIsDeliberate(t *testing.T) {
	stop := errors.New("stopped by you")
	for range 20 {
		ctx, cancel := context.WithCancelCause(t.Context())
		s := dialtest.Serve(t, func(_ string, ch ssh.Channel) {
			cancel(stop)
			io.Copy(io.Discard, ch)
		})
		c := connect(t, s)
		if _, err := c.Run(ctx, "submit", nil, nil, nil); !errors.Is(err, stop) {
			t.Fatalf("Run = %v, want %v", err, stop)
		}
		start := time.Now()
		c.Close()
		if got := <-s.Left; got != "left" {
			t.Fatalf("the server thinks we were %q, want %q", got, "left")
		}
		if d := time.Since(start); d >= lingerFor {
			t.Fatalf("Close took %v: it waited for nothing", d)
		}
	}
}

// A client that dies is no client that leaves.
func TestKilledIsLost(t *testing.T) {
	var c *Client
	ready := make(chan struct{})
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) { close(ready); io.Copy(io.Discard, ch) })
	c = connect(t, s)
	go func() { <-ready; c.conn.Close() }()
	if _, err := c.Run(t.Context(), "submit", nil, nil, nil); !errors.Is(err, ErrLost) {
		t.Errorf("Run = %v, want ErrLost", err)
	}
	if got := <-s.Left; got != "lost" {
		t.Errorf("the server thinks we %q, want lost", got)
	}
}

// A network that swallows everything must not hold up Ctrl-C for a minute.
func TestCancelOnDeadNetwork(t *testing.T) {
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) { fmt.Fprint(ch, "x"); io.Copy(io.Discard, ch) })
	raw, err := net.Dial("tcp", s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	hole := &blackHole{Conn: raw, shut: make(chan struct{})}
	c, err := New(t.Context(), hole, target(s))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	out := writerFunc(func(p []byte) (int, error) {
		close(hole.shut)
		cancel()
		return len(p), nil
	})
	if _, err := c.Run(ctx, "submit", nil, out, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v, want %v", err, context.Canceled)
	}
	c.Close()
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A blackHole drops what is written once shut is closed.
type blackHole struct {
	net.Conn
	shut chan struct{}
}

func (b *blackHole) Write(p []byte) (int, error) {
	select {
	case <-b.shut:
		return len(p), nil
	default:
		return b.Conn.Write(p)
	}
}

func TestSession(t *testing.T) {
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) {
		io.Copy(ch, ch)
		dialtest.Exit(ch, 0)
	})
	c := connect(t, s)
	p, err := c.Start(t.Context(), "runner join", nil)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	for i := range 100 {
		line := fmt.Sprintf("%04d\n", i)
		if _, err := io.WriteString(p.Stdin, line); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p.Stdout, buf); err != nil || string(buf) != line {
			t.Fatalf("echo of %q = %q, %v", line, buf, err)
		}
	}
	p.Signal("INT")
	if got := <-s.Signals; got != "INT" {
		t.Errorf("signal %q, want INT", got)
	}
	p.Stdin.Close()
	io.Copy(io.Discard, p.Stdout)
	for range 2 {
		if code, err := p.Wait(); code != 0 || err != nil {
			t.Errorf("Wait = %d, %v, want 0", code, err)
		}
	}
}

func ecdsaSigner(t *testing.T) ssh.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHostKey(t *testing.T) {
	// ecdsa is what a client would choose by itself; only ed25519 is known.
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) { dialtest.Exit(ch, 0) }, ecdsaSigner(t))
	host := knownhosts.Normalize(s.Addr)
	other := dialtest.Signer(t)
	file := func(lines ...string) []string {
		f := filepath.Join(t.TempDir(), "known_hosts")
		if err := os.WriteFile(f, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{f}
	}
	line := func(k ssh.Signer) string { return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.PublicKey()))) }
	revoked := "@revoked * " + line(s.Host)
	for _, c := range []struct {
		name  string
		hosts []string
		keys  []string
		want  HostKeyError // Addr "" for none
	}{
		{"pinned", nil, []string{line(s.Host)}, HostKeyError{}},
		{"plain", file(host + " " + line(s.Host)), nil, HostKeyError{}},
		{"hashed", file(knownhosts.HashHostname(host) + " " + line(s.Host)), nil, HostKeyError{}},
		{"other pinned, known", file(host + " " + line(s.Host)), []string{line(other)}, HostKeyError{}},
		{"unknown", file("elsewhere " + line(s.Host)), nil, HostKeyError{Addr: s.Addr}},
		{"nobody vouches", nil, nil, HostKeyError{Addr: s.Addr}},
		{"changed", file(host + " " + line(other)), nil, HostKeyError{Addr: s.Addr, Known: true}},
		{"other pinned", nil, []string{line(other)}, HostKeyError{Addr: s.Addr, Known: true}},
		{"port 22 only", file("127.0.0.1 " + line(s.Host)), nil, HostKeyError{Addr: s.Addr}},
		{"revoked", file(revoked, host+" "+line(s.Host)), nil, HostKeyError{Addr: s.Addr, Revoked: true}},
		{"revoked and pinned", file(revoked), []string{line(s.Host)}, HostKeyError{Addr: s.Addr, Revoked: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			target := target(s)
			target.KnownHosts, target.HostKeys = c.hosts, c.keys
			client, err := Dial(t.Context(), target)
			if c.want.Addr == "" {
				if err != nil {
					t.Fatal(err)
				}
				client.Close()
				return
			}
			var e *HostKeyError
			if !errors.As(err, &e) {
				t.Fatalf("Dial = %v, want a HostKeyError", err)
			}
			if e.Addr != c.want.Addr || e.Revoked != c.want.Revoked || !e.Revoked && e.Known != c.want.Known {
				t.Errorf("Dial = %+v, want %+v", e, c.want)
			}
			if !strings.Contains(e.Error(), "SHA256:") || e.Hint() == "" {
				t.Errorf("%v (%s) names no fingerprint or no way out", e, e.Hint())
			}
		})
	}
	// The line of the error must be one that helps.
	target := target(s)
	target.HostKeys = nil
	_, err := Dial(t.Context(), target)
	var e *HostKeyError
	if !errors.As(err, &e) {
		t.Fatalf("Dial = %v, want a HostKeyError", err)
	}
	target.KnownHosts = file(e.Line)
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatalf("with the line %q: %v", e.Line, err)
	}
	c.Close()
}

func TestLogin(t *testing.T) {
	s := dialtest.Serve(t, func(_ string, ch ssh.Channel) { dialtest.Exit(ch, 0) })
	target := target(s)
	wrong := dialtest.Signer(t)
	var e *LoginError
	for _, keys := range [][]ssh.Signer{nil, {wrong}} {
		target.Signers = keys
		_, err := Dial(t.Context(), target)
		if !errors.As(err, &e) || len(e.Offered) != len(keys) {
			t.Errorf("Dial with %d wrong keys = %v, want a LoginError", len(keys), err)
		}
	}
	target.Signers = []ssh.Signer{wrong, s.Client}
	c, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatalf("Dial with the second key right: %v", err)
	}
	c.Close()
}

func TestDialFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := Target{Addr: l.Addr().String(), Signers: []ssh.Signer{dialtest.Signer(t)}}
	// Somebody who accepts and says nothing: the context must end it.
	ctx, cancel := context.WithCancelCause(t.Context())
	late := errors.New("too late")
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			c.Read(make([]byte, 1))
			cancel(late)
			io.Copy(io.Discard, c)
		}
	}()
	if _, err := Dial(ctx, target); !errors.Is(err, late) || !errors.Is(err, ErrConnect) {
		t.Errorf("Dial = %v, want %v", err, late)
	}
	l.Close()
	if _, err := Dial(t.Context(), target); !errors.Is(err, ErrConnect) {
		t.Errorf("Dial of a closed port = %v, want ErrConnect", err)
	}
}

func TestTrust(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("USERPROFILE", dir)
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(dialtest.Signer(t).PublicKey())))
	os.Mkdir(filepath.Join(dir, ".ssh"), 0o700)
	known := filepath.Join(dir, ".ssh", "known_hosts")
	os.WriteFile(known, nil, 0o600)
	var tg Target
	if err := tg.Trust("", filepath.Join(dir, "admin")); err != nil || len(tg.KnownHosts) != 1 || tg.KnownHosts[0] != known {
		t.Errorf("Trust = %v, %v, want %s", tg.KnownHosts, err, known)
	}
	os.WriteFile(filepath.Join(dir, "host_key.pub"), []byte(line+"\n"), 0o644)
	tg = Target{}
	if err := tg.Trust("", filepath.Join(dir, "admin")); err != nil || len(tg.KnownHosts) != 0 || len(tg.HostKeys) != 1 || tg.HostKeys[0] != line {
		t.Errorf("Trust = %v, %v, want the key beside the identity", tg, err)
	}
	tg = Target{}
	if err := tg.Trust(filepath.Join(dir, "none"), ""); err == nil {
		t.Error("Trust of a file that is not there: no error")
	}
}
