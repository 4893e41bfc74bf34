package door

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
)

// Each test here attacks one or more of the defects that the package comment lists.

// Defects a, n, q: nothing works without keys, Authorize and Handle.
func TestNewRefuses(t *testing.T) {
	key := []ssh.Signer{dialtest.Signer(t)}
	authorize := func(context.Context, ssh.PublicKey, netip.AddrPort) (keys.Identity, error) {
		return keys.Identity{}, nil
	}
	handle := func(context.Context, *Session) int { return 0 }
	for name, cfg := range map[string]Config{
		"no host key":   {Authorize: authorize, Handle: handle},
		"two of a type": {HostKeys: []ssh.Signer{dialtest.Signer(t), dialtest.Signer(t)}, Authorize: authorize, Handle: handle},
		"no Authorize":  {HostKeys: key, Handle: handle},
		"no Handle":     {HostKeys: key, Authorize: authorize},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("New with %s: no error", name)
		}
	}
}

// Defect a: method none, and every other method but publickey.
func TestNoWayInWithoutKey(t *testing.T) {
	h := open(t, Config{})
	for name, auth := range map[string][]ssh.AuthMethod{
		"none":     nil,
		"password": {ssh.Password("")},
		"keyboard-interactive": {ssh.KeyboardInteractive(func(string, string, []string, []bool) ([]string, error) {
			return nil, nil
		})},
	} {
		cfg := clientConfig("root\nauthentication", h.ada)
		cfg.Auth = auth
		if _, err := ssh.Dial("tcp", h.addr, cfg); err == nil {
			t.Errorf("logged in with %s", name)
		}
	}
	h.Shutdown(t.Context())
	for line := range strings.Lines(h.logged()) {
		if !strings.HasPrefix(line, "authentication failure from 127.0.0.1 port ") || !strings.Contains(line, `key none user "root\nauth`) {
			t.Errorf("log line %q, want an authentication failure", line)
		}
	}
}

// stolen is a Signer that offers one key and signs in its own way.
type stolen struct {
	public ssh.PublicKey
	sign   func(io.Reader, []byte) (*ssh.Signature, error)
}

func (s stolen) PublicKey() ssh.PublicKey                              { return s.public }
func (s stolen) Sign(r io.Reader, data []byte) (*ssh.Signature, error) { return s.sign(r, data) }

// Defects d, e: ada's key is offered but not signed with; the name is bob's.
func TestIdentityIsTheKeyThatSigned(t *testing.T) {
	who := make(chan keys.Identity, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { who <- s.Who; return 0 }})
	stranger := dialtest.Signer(t)
	offered := stolen{h.ada.PublicKey(), func(io.Reader, []byte) (*ssh.Signature, error) { return nil, errors.New("cannot sign") }}
	cfg := clientConfig("bob", offered)
	cfg.AuthCallback = func(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
		if len(c.TriedMethods) == 2 { // none, publickey
			return ssh.PublicKeys(stranger), nil
		}
		return nil, nil
	}
	c, err := ssh.Dial("tcp", h.addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := session(t, c).Run("x"); err != nil {
		t.Fatal(err)
	}
	want := keys.Identity{Role: keys.Guest, Fingerprint: ssh.FingerprintSHA256(stranger.PublicKey())}
	if got := receive(t, who, "session"); got != want {
		t.Errorf("offered ada's key, signed with another: %+v, want %+v", got, want)
	}
	// A signature by another key is no proof.
	forged := stolen{h.ada.PublicKey(), stranger.Sign}
	if _, err := ssh.Dial("tcp", h.addr, clientConfig("rai", forged)); err == nil {
		t.Error("logged in with a signature by another key")
	}
	// Nor does the name count.
	c, err = ssh.Dial("tcp", h.addr, clientConfig("bob", h.ada))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := session(t, c).Run("x"); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, who, "session"); got.User != "ada" {
		t.Errorf("ada's key as user bob: %+v, want ada", got)
	}
}

// Defect b, and everything else a session may be asked.
func TestRequests(t *testing.T) {
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		_, pty := s.PTY()
		fmt.Fprint(s, pty, s.Command, s.Env("LC_ALL"), s.Env("LD_PRELOAD"), s.Env("RAI_X"))
		return 0
	}})
	ch, reqs, err := h.dial(t, h.ada).OpenChannel("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	str := func(s ...string) (out []byte) {
		for _, s := range s {
			out = append(out, ssh.Marshal(struct{ S string }{s})...)
		}
		return out
	}
	ff := bytes.Repeat([]byte{0xff}, 8)
	for _, tt := range []struct {
		name    string
		payload []byte
		want    bool
	}{
		{"pty-req", ff, false},
		{"pty-req", ff[:4], false},
		{"pty-req", nil, false},
		{"pty-req", append(str("xterm"), ff[:5]...), false},
		{"window-change", ff[:3], false},
		{"window-change", bytes.Repeat(ff, 2), true},
		{"signal", ff, false},
		{"signal", str("SEGV"), false},
		{"env", ff, false},
		{"env", str("LD_PRELOAD", "x.so"), false},
		{"env", str("PATH", "/"), false},
		{"env", str("LC_\x00", "x"), false},
		{"env", str("LC_ALL=", "x"), false},
		{"env", str("RAI_X", "a\x00b"), false},
		{"env", str("RAI_BIG", strings.Repeat("x", maxEnv)), false},
		{"env", str("LC_ALL", "C"), true},
		{"auth-agent-req@openssh.com", nil, false},
		{"x11-req", append([]byte{0}, str("MIT-MAGIC-COOKIE-1", "00")...), false},
		{"subsystem", str("sftp"), false},
		{"break", []byte{0, 0, 0, 9}, false},
		{"no-such-request", ff, false},
		{"exec", ff, false},
		{"exec", nil, false},
		{"exec", str(strings.Repeat("x", maxCommand)), false},
		{"exec", str("run"), true},
	} {
		ok, err := ch.SendRequest(tt.name, true, tt.payload)
		if tt.name == "exec" && ok {
			if out, err := io.ReadAll(ch); err != nil || string(out) != "falserunC" {
				t.Errorf("output %q, %v; want falserunC", out, err)
			}
			break
		}
		if ok != tt.want || err != nil {
			t.Errorf("%s %.32q: %v, %v; want %v", tt.name, tt.payload, ok, err, tt.want)
		}
	}
}

// The second command of a channel is refused while the first runs.
func TestOneCommand(t *testing.T) {
	release := make(chan bool)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { <-release; return 0 }})
	s := session(t, h.dial(t, h.ada))
	if err := s.Start("x"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"exec", "shell", "env", "pty-req", "subsystem"} {
		if ok, err := s.SendRequest(name, true, ssh.Marshal(struct{ S string }{"x"})); ok || err != nil {
			t.Errorf("%s after exec: %v, %v; want a refusal", name, ok, err)
		}
	}
	close(release)
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
}

// Defect l: no more environment than there is room for.
func TestEnvFlood(t *testing.T) {
	kept := make(chan int, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int { kept <- len(s.env)*1000000 + s.envSize; return 0 }})
	for name, value := range map[string]string{"many": "", "long": strings.Repeat("x", 1000)} {
		s := session(t, h.dial(t, h.ada))
		granted := 0
		for i := range 500 {
			if s.Setenv(fmt.Sprint("RAI_", i), value) == nil {
				granted++
			}
		}
		if err := s.Run("x"); err != nil {
			t.Fatal(err)
		}
		got := receive(t, kept, "session")
		if n, size := got/1000000, got%1000000; n != granted || n == 0 || n > maxEnvVars || size > maxEnv {
			t.Errorf("%s: %d variables of %d bytes kept, %d granted; want the same number, at most %d and %d", name, n, size, granted, maxEnvVars, maxEnv)
		}
	}
}

// Defect c: a panic is one session's.
func TestPanic(t *testing.T) {
	h := open(t, Config{
		Handle: func(ctx context.Context, s *Session) int {
			if s.Command == "ok" {
				return 0
			}
			fmt.Fprint(s, "before")
			panic("boom in " + s.Command)
		},
	})
	c := h.dial(t, h.ada)
	s := session(t, c)
	var out, errs strings.Builder
	s.Stdout, s.Stderr = &out, &errs
	if got := exitStatus(t, s.Run("x")); got != 125 {
		t.Errorf("exit status after a panic = %d, want 125", got)
	}
	if out.String() != "before" || !strings.HasPrefix(errs.String(), "raid: internal error in session ") {
		t.Errorf("output %q, stderr %q after a panic", out.String(), errs.String())
	}
	if err := session(t, c).Run("ok"); err != nil {
		t.Errorf("next session on the connection: %v", err)
	}
	if !strings.Contains(h.logged(), "boom in x") || !strings.Contains(h.logged(), "TestPanic") {
		t.Errorf("log = %q, want the panic and its stack", h.logged())
	}
}

// Defect c: a panic in Authorize refuses the key.
func TestPanicInAuthorize(t *testing.T) {
	h := open(t, Config{Authorize: func(context.Context, ssh.PublicKey, netip.AddrPort) (keys.Identity, error) { panic("boom") }})
	for range 2 {
		if _, err := ssh.Dial("tcp", h.addr, clientConfig("rai", h.ada)); err == nil {
			t.Error("logged in through a panic")
		}
	}
}

// Defect f: one channel's end is not the other's.
func TestSessionContext(t *testing.T) {
	running := make(chan bool)
	ends := map[string]chan error{"one": make(chan error, 1), "two": make(chan error, 1)}
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		running <- true
		<-ctx.Done()
		ends[s.Command] <- context.Cause(ctx)
		return 1
	}})
	c := h.dial(t, h.ada)
	one, two := session(t, c), session(t, c)
	one.Start("one")
	two.Start("two")
	receive(t, running, "session")
	receive(t, running, "session")
	one.Close()
	if got := receive(t, ends["one"], "end"); got != ErrLeft {
		t.Errorf("closed channel: cause = %v, want %v", got, ErrLeft)
	}
	select {
	case err := <-ends["two"]:
		t.Errorf("other channel ended too: %v", err)
	default:
	}
	c.Close()
	if got := receive(t, ends["two"], "end"); got != ErrLost {
		t.Errorf("other channel: cause = %v, want %v", got, ErrLost)
	}
}

// Defects g, h: signals and resizes that nobody reads, before and after the command.
func TestFloodsNobodyReads(t *testing.T) {
	release := make(chan bool)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		if s.Command == "wait" {
			<-release
		}
		return 5
	}})
	c := h.dial(t, h.ada)
	s := session(t, c)
	if err := s.RequestPty("xterm", 24, 80, nil); err != nil {
		t.Fatal(err)
	}
	flood := func() {
		for i := range 200 {
			s.WindowChange(i, i)
			s.Signal(ssh.SIGINT)
		}
	}
	flood()
	if err := s.Start("wait"); err != nil {
		t.Fatal(err)
	}
	flood()
	if got := exitStatus(t, session(t, c).Run("x")); got != 5 { // the connection lives
		t.Errorf("other session: %d, want 5", got)
	}
	close(release)
	if got := exitStatus(t, s.Wait()); got != 5 {
		t.Errorf("flooded session: %d, want 5", got)
	}
}

// Defect i: a session that is ended from here has the handler's status, not 0.
func TestStatusWhenCancelled(t *testing.T) {
	running := make(chan bool, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		running <- true
		<-ctx.Done()
		fmt.Fprint(s.Stderr(), "raid: ", context.Cause(ctx))
		return 75
	}})
	s := session(t, h.dial(t, h.ada))
	var errs strings.Builder
	s.Stderr = &errs
	s.Start("x")
	receive(t, running, "session")
	h.Shutdown(t.Context())
	if got := exitStatus(t, s.Wait()); got != 75 {
		t.Errorf("exit status at shutdown = %d, want 75", got)
	}
	if want := "raid: " + ErrShutdown.Error(); errs.String() != want {
		t.Errorf("stderr = %q, want %q", errs.String(), want)
	}
}

// Defect k: sessions of one connection. A channel counts until both sides closed it.
func TestMaxSessions(t *testing.T) {
	h := open(t, Config{MaxSessions: 3, Handle: func(ctx context.Context, s *Session) int { <-ctx.Done(); return 0 }})
	c := h.dial(t, h.ada)
	all := []*ssh.Session{session(t, c), session(t, c), session(t, c)}
	var refused *ssh.OpenChannelError
	if _, err := c.NewSession(); !errors.As(err, &refused) || refused.Reason != ssh.ResourceShortage {
		t.Errorf("fourth session: %v, want a refusal for want of resources", err)
	}
	all[0].Start("x")
	all[0].Close()
	for { // the refusals stop once the session has gone; each is an exchange
		s, err := c.NewSession()
		if err == nil {
			s.Close()
			break
		}
	}
}

// Forwarding, either way, and other channels and global requests: all are answered.
func TestNothingButSessions(t *testing.T) {
	h := open(t, Config{})
	c := h.dial(t, h.ada)
	for _, kind := range []string{"direct-tcpip", "direct-streamlocal@openssh.com", "x11", "tun@openssh.com", ""} {
		var refused *ssh.OpenChannelError
		if _, _, err := c.OpenChannel(kind, []byte("junk")); !errors.As(err, &refused) {
			t.Errorf("channel %q: %v, want a refusal", kind, err)
		}
	}
	for _, kind := range []string{"tcpip-forward", "cancel-tcpip-forward", "streamlocal-forward@openssh.com", "keepalive@openssh.com", ""} {
		if ok, _, err := c.SendRequest(kind, true, []byte{0xff, 0xff, 0xff, 0xff}); ok || err != nil {
			t.Errorf("global request %q: %v, %v; want a refusal", kind, ok, err)
		}
	}
	if err := session(t, c).Run("x"); err != nil {
		t.Error(err)
	}
}

// A client that does not read stops its own session and nothing else.
func TestStoppedReader(t *testing.T) {
	stuck := make(chan error, 1)
	h := open(t, Config{Handle: func(ctx context.Context, s *Session) int {
		if s.Command == "flood" {
			_, err := io.Copy(s, zeros{})
			stuck <- err
		}
		return 0
	}})
	c := h.dial(t, h.ada)
	ch, reqs, err := c.OpenChannel("session", nil) // nobody reads it
	if err != nil {
		t.Fatal(err)
	}
	go ssh.DiscardRequests(reqs)
	ch.SendRequest("exec", true, ssh.Marshal(struct{ S string }{"flood"}))
	for range 10 {
		if err := session(t, c).Run("x"); err != nil {
			t.Fatal(err)
		}
	}
	ch.Close()
	if err := receive(t, stuck, "end of the write"); err == nil {
		t.Error("the write ended without an error")
	}
}

// Garbage instead of a handshake costs nothing but a connection.
func TestGarbage(t *testing.T) {
	h := open(t, Config{})
	for _, junk := range []string{"", "\x00", "GET / HTTP/1.0\r\n\r\n", "SSH-2.0-x\r\n\xff\xff\xff\xff", "SSH-1.5-x\r\n",
		"SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x14" + strings.Repeat("\x00", 10), strings.Repeat("A", 1<<16)} {
		nc, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(nc, junk)
		nc.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, nc) // until the server closes it
		nc.Close()
	}
	if err := session(t, h.dial(t, h.ada)).Run("x"); err != nil {
		t.Error(err)
	}
}
