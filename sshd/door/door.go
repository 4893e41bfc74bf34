// Package door is raid's front door: SSH connections that are hard to abuse.
//
// It turns TCP connections into Sessions: who somebody is, proved by a key; one
// command; two output streams; an exit status. What the commands are is not its
// business. A server is made with New, fed listeners with Serve and ended with
// Shutdown:
//
//	srv, err := door.New(door.Config{HostKeys: keys, Authorize: who, Handle: run})
//	go srv.Serve(listener)
//	...
//	srv.Shutdown(ctx)
//
// # Promises
//
//   - Identity comes from a key whose signature was checked. The login name is
//     never looked at.
//   - A session's context ends with its own channel, not with its connection, and
//     context.Cause says why: ErrLeft, ErrLost, ErrShutdown or ErrRevoked.
//   - Output, then exit-status, EOF and close reach the client in this order, for
//     every handler, even one that panics. The client's stdin is never waited for.
//   - Every request gets its reply, every channel that is not a session is refused,
//     and nothing a client sends or fails to read can stall another connection.
//   - What a stranger can hold is bounded: time and connections before login,
//     sessions, environment, command length, silence.
//
// # Many doors
//
// Several raids may serve one deployment, of which one leads. The others pass the
// sessions of their clients on to it over a [Link], channel by channel: bytes, requests
// and exit status as they are, and why the client went. The leader looks the client's
// key up itself. What it must believe is that the client has proved the key, and where
// it called from; it believes that of keys with the role keys.Door, and of no other.
//
// # Non-goals
//
// No forwarding of any kind, no agent, no X11, no subsystems, no passwords. Output
// is passed as it is: making text safe for a terminal is the handler's business.
//
// # Under it
//
// github.com/gliderlabs/ssh v0.3.8 runs the handshake and the connection; this file
// is the only one that knows it. Its session code is not used at all: it can be
// crashed, stalled and confused from outside. Comments "defect a" to "defect t" mark
// the lines that close its known faults, and the tests that attack them:
//
//	a  without handlers it lets anybody in with method "none"
//	b  a malformed pty-req crashes the process
//	c  a panic in a handler crashes the process
//	d  the user name is that of the first attempt: one key passes as somebody else's
//	e  permissions are shared by all keys offered: an unsigned key may count
//	f  a session's context is its connection's: a ControlMaster client cannot cancel
//	g  signals nobody reads deadlock the exit
//	h  resizes nobody reads stall the connection
//	i  an idle time-out is reported to the client as exit 0
//	j  deadlines set on the connection are wiped: no login time limit
//	k  no limit on connections before login, per source, nor on sessions
//	l  environment requests are kept without limit
//	m  agent forwarding is always granted
//	n  a missing handler panics
//	o  stderr is not made fit for a terminal
//	p  its handshake deadline races with its idle deadline
//	q  a missing host key is replaced by a fresh one at each start
//	r  its context's fields race
//	s  options set after start race
//	t  Shutdown waits for connections without end
package door

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	gliderlabs "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// Causes of the end of a session's context, as context.Cause reports them.
var (
	// ErrLeft: the client went on purpose. It said goodbye (Ctrl-C, a closed
	// window, kill -TERM) or closed the channel of a connection that lives on.
	ErrLeft = errors.New("client left")
	// ErrLost: the connection broke, fell silent, or its client was killed.
	ErrLost = errors.New("connection lost")
	// ErrShutdown: Shutdown was called. The client is still there to be told.
	ErrShutdown = errors.New("server is shutting down")
	// ErrRevoked: Close was called for the session's key.
	ErrRevoked = errors.New("access revoked")
)

// ErrClosed is what Serve returns after Shutdown.
var ErrClosed = errors.New("door closed")

// Config is what a Server is made from. It is copied by New.
type Config struct {
	// HostKeys prove the server to its clients, at most one of each type. At least
	// one is needed, and none is ever made up.
	HostKeys []ssh.Signer

	// Authorize says who a key belongs to. It is a pure look-up: it may be called
	// for keys the client does not hold, several times, before any proof. An error
	// refuses the key. It decides about guests: an Identity with Role keys.Guest
	// lets an unknown key in, once the client has nothing better to offer (see
	// login). The key may be an *ssh.Certificate whose CA signature nobody has
	// checked yet: verify it with ssh.CertChecker or refuse it. ctx ends with the
	// connection. Fingerprint is filled in when it is left empty.
	Authorize func(ctx context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error)

	// IsRaid says whether a key that Authorize takes for nobody's is another raid's of the
	// deployment, which then has the role keys.Door. It may ask somebody and wait a while,
	// as long as ctx lasts, and is therefore only asked about whoever logs in here itself:
	// what comes over a Link is answered one by one, and never waits for it. Defaults to no.
	IsRaid func(ctx context.Context, key ssh.PublicKey) bool

	// Route says where the next session of a client is to be handled: by the raid at
	// the other end of a Link, or, if that is nil, by Handle. It may wait a while for
	// the answer, not longer than ctx lasts. With it, Authorize is asked again before each
	// session that is handled here. Defaults to Handle always.
	Route func(ctx context.Context) *Link

	// Handle runs one session and returns its exit status. It returns soon after
	// ctx ends and leaves no goroutine behind that uses the Session. A panic is
	// logged and becomes status 125.
	Handle func(ctx context.Context, s *Session) int

	// Logf takes one line, for operators. It is called from many goroutines. Failed
	// logins have one stable form, made for fail2ban:
	//
	//	authentication failure from 192.0.2.7 port 51234 key SHA256:… user "rai"
	//
	// where the key is the last one offered, or "none". Defaults to no log.
	Logf func(format string, args ...any)

	MaxPreauth          int           // connections that have not logged in; more wait. Defaults to 512
	MaxPreauthPerSource int           // of these, from one IPv4 address or IPv6 /64; more wait aside. Defaults to 256
	MaxSessions         int           // channels of one connection. Defaults to 10
	Grace               time.Duration // time to log in. Defaults to 30 s
	KeepAlive           time.Duration // of silence before the client is asked for a sign of life; three without any, and it is lost. Defaults to 15 s
}

// A Server accepts connections and runs their sessions. Its methods may be called
// from several goroutines.
type Server struct {
	cfg      Config
	base     *gliderlabs.Server
	gate     *gate
	buffers  *buffers
	closing  context.Context // ends when Shutdown begins, with cause ErrShutdown
	close    context.CancelCauseFunc
	work     sync.WaitGroup // one for each connection
	sessions atomic.Uint64  // numbers them

	mu        sync.Mutex // protects the following
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
}

// New checks cfg and fills in its defaults. The Server does nothing before Serve.
func New(cfg Config) (*Server, error) {
	if len(cfg.HostKeys) == 0 { // defect q
		return nil, errors.New("ssh server: no host key")
	}
	for i, key := range cfg.HostKeys {
		same := func(other ssh.Signer) bool { return other.PublicKey().Type() == key.PublicKey().Type() }
		if slices.ContainsFunc(cfg.HostKeys[:i], same) { // gliderlabs would keep the last
			return nil, fmt.Errorf("ssh server: two host keys of type %s", key.PublicKey().Type())
		}
	}
	if cfg.Authorize == nil || cfg.Handle == nil { // defects a, n
		return nil, errors.New("ssh server: Authorize and Handle must be set")
	}
	if cfg.Logf == nil {
		cfg.Logf = func(string, ...any) {}
	}
	setDefault(&cfg.MaxPreauth, 512)
	setDefault(&cfg.MaxPreauthPerSource, 256)
	setDefault(&cfg.MaxSessions, 10)
	setDefault(&cfg.Grace, 30*time.Second)
	setDefault(&cfg.KeepAlive, 15*time.Second)
	s := &Server{
		cfg:       cfg,
		gate:      newGate(cfg.MaxPreauth, cfg.MaxPreauthPerSource),
		buffers:   newBuffers(),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*conn]struct{}{},
	}
	s.closing, s.close = context.WithCancelCause(context.Background())
	s.base = s.gliderlabs()
	return s, nil
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// connKey finds our conn in gliderlabs' context.
type connKey struct{}

// gliderlabs builds the server under ours. All of its callbacks are set before the
// first connection and never change (defect s).
func (s *Server) gliderlabs() *gliderlabs.Server {
	signers := make([]gliderlabs.Signer, len(s.cfg.HostKeys))
	for i, key := range s.cfg.HostKeys {
		signers[i] = key
	}
	return &gliderlabs.Server{
		Version:     "raid",
		HostSigners: signers,
		ConnCallback: func(ctx gliderlabs.Context, nc net.Conn) net.Conn {
			ctx.SetValue(connKey{}, nc.(*wire).conn)
			return nc
		},
		// Not nil, or everybody is let in: defect a. The permissions are fresh for
		// each key and end up in the connection only with the key that signed:
		// defect e. The user name is not asked for: defect d.
		PublicKeyHandler: func(ctx gliderlabs.Context, key gliderlabs.PublicKey) bool {
			c := ctx.Value(connKey{}).(*conn)
			perms, err := c.login.offer(key)
			ctx.SetValue(gliderlabs.ContextKeyPermissions, &gliderlabs.Permissions{Permissions: perms})
			return err == nil
		},
		ServerConfigCallback: func(ctx gliderlabs.Context) *ssh.ServerConfig {
			return ctx.Value(connKey{}).(*conn).login.config()
		},
		// Every other global request is refused with a reply, tcpip-forward too; every
		// channel but these is rejected.
		RequestHandlers: map[string]gliderlabs.RequestHandler{
			whoRequest: func(ctx gliderlabs.Context, _ *gliderlabs.Server, r *ssh.Request) (bool, []byte) {
				return ctx.Value(connKey{}).(*conn).answerWho(r.Payload)
			},
		},
		ChannelHandlers: map[string]gliderlabs.ChannelHandler{
			"session": func(_ *gliderlabs.Server, peer *ssh.ServerConn, nc ssh.NewChannel, ctx gliderlabs.Context) {
				ctx.Value(connKey{}).(*conn).session(peer, nc)
			},
			carriedChannel: func(_ *gliderlabs.Server, peer *ssh.ServerConn, nc ssh.NewChannel, ctx gliderlabs.Context) {
				ctx.Value(connKey{}).(*conn).receive(peer, nc)
			},
		},
	}
}

// Serve accepts connections on l until Shutdown, when it returns ErrClosed, or until
// l fails for good. It closes l. Several listeners may be served at once.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	if !s.track(l) {
		return ErrClosed
	}
	defer s.untrack(l)
	wait := time.Duration(0)
	for {
		if err := s.gate.room(s.closing); err != nil {
			return ErrClosed
		}
		nc, err := l.Accept()
		if err == nil {
			wait = 0
			s.start(nc)
			continue
		}
		s.gate.giveBack()
		if s.closing.Err() != nil {
			return ErrClosed
		}
		if temporary, ok := err.(interface{ Temporary() bool }); !ok || !temporary.Temporary() {
			return fmt.Errorf("accept: %w", err)
		}
		// Out of file descriptors: they come back when somebody leaves.
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		s.cfg.Logf("accept: %v; again in %v", err, wait)
		select {
		case <-time.After(wait):
		case <-s.closing.Done():
		}
	}
}

// start gives nc a goroutine, unless the server is closing.
func (s *Server) start(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		s.gate.giveBack()
		nc.Close()
		return
	}
	c := newConn(s, nc)
	s.conns[c] = struct{}{}
	s.work.Go(func() { s.serve(c) })
}

// serve runs one connection from its first byte until its last session has ended.
func (s *Server) serve(c *conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	defer c.finish()
	defer s.contain("connection from " + c.from.String())
	if c.admit() {
		s.base.HandleConn(c.wire)
	}
}

// contain logs a panic and ends it: one guest cannot bring down the house (defect c).
func (s *Server) contain(where string) {
	if p := recover(); p != nil {
		s.cfg.Logf("panic in %s: %v\n%s", where, p, debug.Stack())
	}
}

// Close ends the connections of the key with this fingerprint. Their sessions'
// contexts end with cause ErrRevoked; a handler has a few seconds to say so before
// the connection is cut.
func (s *Server) Close(fingerprint string) {
	for _, c := range s.connections() {
		c.revoke(fingerprint)
	}
}

// Shutdown ends the server: it stops accepting, cancels every session with cause
// ErrShutdown, waits for the handlers until ctx ends, and closes all connections.
// The error says how many connections had to be cut. It may be called again.
func (s *Server) Shutdown(ctx context.Context) error { // defect t
	s.mu.Lock()
	s.close(ErrShutdown)
	for l := range s.listeners {
		l.Close()
	}
	s.mu.Unlock()
	for _, c := range s.connections() {
		c.retire()
	}
	done := make(chan struct{})
	go func() { s.work.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	left := s.connections()
	for _, c := range left {
		c.cut(ErrShutdown)
	}
	select { // a handler that looks at nothing, ctx nor errors, is left behind
	case <-done:
	case <-time.After(time.Second):
	}
	return fmt.Errorf("shut down: %d connections cut: %w", len(left), context.Cause(ctx))
}

func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

func (s *Server) track(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) untrack(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}
