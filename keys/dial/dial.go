// Package dial is the client side of raid's SSH: runners, rai and rai-keygen all
// speak to raid through it.
//
// A [Client] is one connection to a server whose host key was pinned beforehand; an
// unknown or changed key ends the dial with a [HostKeyError] that says what was seen
// and how to trust it. There is no way to switch that off and no first-use trust.
// Commands run with [Client.Run] (streams in, status out) or [Client.Start] (pipes,
// for long conversations).
//
//	t, err := dial.Parse("rai@gpu.example.edu:2222")
//	t.Signers, t.KnownHosts = []ssh.Signer{key}, []string{"known_hosts"}
//	c, err := dial.Dial(ctx, t)
//	defer c.Close()
//	status, err := c.Run(ctx, "status 17", nil, os.Stdout, os.Stderr)
//
// Leaving is told apart from being cut off. raid cancels a job when its client goes
// on purpose and lets it run when the network died. ssh(1) says goodbye with a
// disconnect message, which x/crypto cannot send; a client of this package closes
// the session's channel instead, and [Client.Close] then keeps the connection alive
// until raid has seen that it lives. A process that is killed says nothing, and its
// job goes on.
//
// Non-goals: other methods than public keys, terminals, forwarding, reconnecting.
package dial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"
)

// Defaults of an address: raid's own port, and the login name that people use. raid
// ignores the name; the key is the identity.
const (
	DefaultUser = "rai"
	DefaultPort = 2222
)

const (
	dialTimeout  = 10 * time.Second // to the end of the key exchange
	loginTimeout = 30 * time.Second // for a touch of a security key, or an agent that asks
	keepEvery    = 15 * time.Second
	keepWithin   = 3 * keepEvery // what an answer may take on a slow line with a full buffer
	lingerFor    = time.Second   // for raid to see that a closed channel was closed on purpose
)

// Errors of a connection, wrapped; both mean that raid could not be asked, not that
// a command failed.
var (
	// ErrConnect: no connection was made: no route, no such host, not raid.
	ErrConnect = errors.New("cannot connect")
	// ErrLost: the connection ended before the command did.
	ErrLost = errors.New("connection lost")
)

// A Target says where raid is, who it must prove to be and who we are. At least one
// of KnownHosts and HostKeys must vouch for the server.
type Target struct {
	User       string       // defaults to DefaultUser
	Addr       string       // host:port
	KnownHosts []string     // known_hosts files; each must exist
	HostKeys   []string     // lines in authorized_keys form; each is good for Addr
	Signers    []ssh.Signer // tried in order
	Agent      bool         // also try the keys of the agent at SSH_AUTH_SOCK
}

// Parse reads "host", "user@host", "user@host:port", "[::1]:port" or the same after
// "ssh://".
func Parse(s string) (Target, error) {
	bad := func(why string) (Target, error) {
		return Target{}, fmt.Errorf("server %q: %s; it should look like rai@host:%d", s, why, DefaultPort)
	}
	rest := strings.TrimSuffix(strings.TrimPrefix(s, "ssh://"), "/")
	t := Target{User: DefaultUser}
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		t.User, rest = rest[:i], rest[i+1:]
	}
	host, port, err := splitPort(rest)
	if err != nil {
		return bad(err.Error())
	}
	odd := func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(" @/[]\"'", r) }
	switch {
	case t.User == "" || strings.ContainsFunc(t.User, odd):
		return bad("bad user name")
	case host == "" || host[0] == '-' || strings.ContainsFunc(host, odd):
		return bad("bad host name")
	}
	t.Addr = net.JoinHostPort(host, strconv.Itoa(port))
	return t, nil
}

// splitPort parts host and port; a bare IPv6 address has no port.
func splitPort(s string) (host string, port int, err error) {
	if strings.Count(s, ":") != 1 && !strings.HasPrefix(s, "[") {
		return s, DefaultPort, nil
	}
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		return s[1 : len(s)-1], DefaultPort, nil
	}
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, errors.New("bad address")
	}
	port, err = strconv.Atoi(p)
	if err != nil || port < 1 || port > 65535 {
		return "", 0, fmt.Errorf("bad port %q", p)
	}
	return host, port, nil
}

// A Client is one connection. Its methods are safe for concurrent use.
type Client struct {
	conn ssh.Conn
	host ssh.PublicKey
	wg   sync.WaitGroup
	done chan struct{} // closed when the connection has ended
	err  error         // why; set before done closes

	mu    sync.Mutex      // protects the following
	asked chan struct{}   // closed and replaced at each request the server makes
	left  <-chan struct{} // asked, as it was when a session was last left early
}

// Dial connects to t and logs in. ctx bounds that only. The error wraps ErrConnect,
// or is a *HostKeyError or a *LoginError.
func Dial(ctx context.Context, t Target) (*Client, error) {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "tcp", t.Addr)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("%w to %s: %w", ErrConnect, t.Addr, err)
	}
	return New(ctx, conn, t)
}

// New logs in over a connection that exists and owns it from then on, after an error
// too. It is Dial for callers with a transport of their own.
func New(ctx context.Context, conn net.Conn, t Target) (*Client, error) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetNoDelay(true) // Go's default; live output depends on it
	}
	var host ssh.PublicKey
	cfg, cleanup, err := config(t, func(k ssh.PublicKey) {
		host = k
		conn.SetDeadline(time.Now().Add(loginTimeout))
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer cleanup()
	conn.SetDeadline(time.Now().Add(dialTimeout)) // the host key check moves it on
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	c, chans, reqs, err := ssh.NewClientConn(conn, t.Addr, cfg)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, explain(t, err)
	}
	conn.SetDeadline(time.Time{})
	return start(c, host, chans, reqs), nil
}

// start starts the goroutines that a connection needs; Close waits for them.
func start(conn ssh.Conn, host ssh.PublicKey, chans <-chan ssh.NewChannel, reqs <-chan *ssh.Request) *Client {
	c := &Client{conn: conn, host: host, done: make(chan struct{}), asked: make(chan struct{})}
	c.wg.Go(func() {
		for ch := range chans { // a server has no business opening channels to us
			ch.Reject(ssh.Prohibited, "no channels to a client")
		}
	})
	c.wg.Go(func() { c.answer(reqs) })
	c.wg.Go(c.keepAlive)
	c.wg.Go(func() {
		c.err = conn.Wait()
		close(c.done)
	})
	return c
}

// answer replies to what the server asks. We know none of it, but any answer proves
// that we live: raid asks after a channel was closed, to know why.
func (c *Client) answer(reqs <-chan *ssh.Request) {
	for r := range reqs {
		if r.WantReply {
			r.Reply(false, nil)
		}
		c.mu.Lock()
		close(c.asked)
		c.asked = make(chan struct{})
		c.mu.Unlock()
	}
}

// keepAlive ends a connection whose other side has fallen silent; TCP alone may take
// a quarter of an hour to notice.
func (c *Client) keepAlive() {
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-tick.C:
		}
		late := time.AfterFunc(keepWithin, func() { c.conn.Close() })
		_, _, err := c.conn.SendRequest("keepalive@openssh.com", true, nil)
		late.Stop()
		if err != nil {
			return
		}
	}
}

// Done is closed when the connection has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.done }

// ServerVersion returns what the server calls itself, "SSH-2.0-raid".
func (c *Client) ServerVersion() string { return string(c.conn.ServerVersion()) }

// HostKey returns the key that the server proved to hold.
func (c *Client) HostKey() ssh.PublicKey { return c.host }

// leave notes that a session was closed before its command had ended.
func (c *Client) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.left = c.asked
}

// Close ends the connection and waits for its goroutines. If a session was left
// early it first gives raid up to a second to see that this was on purpose. It may be
// called more than once; the error is always nil.
func (c *Client) Close() error {
	c.mu.Lock()
	left := c.left
	c.left = nil
	c.mu.Unlock()
	if left != nil {
		t := time.AfterFunc(lingerFor, func() { c.conn.Close() })
		defer t.Stop()
		select {
		case <-left:
			// raid asked and we answered. One more round trip, and it has read that
			// answer: it must not find the answer and the end in the same moment.
			c.conn.SendRequest("keepalive@openssh.com", true, nil)
		case <-c.done:
		}
	}
	c.conn.Close()
	c.wg.Wait()
	return nil
}

// Run runs one command: stdin goes to it until it ends (nil: nothing), its streams go
// to stdout and stderr (nil: nowhere). It returns the command's exit status once both
// have been written.
//
// env is as for Start. When ctx ends the session is closed at once and the error is ctx's cause. The same
// happens when a stream of ours fails: the command must not take half an input for
// the whole. Nothing is waited for that may never end: if the command ends first, one
// goroutine stays behind in stdin's Read until that returns, and after an early end
// one may stay in a Write of stdout.
func (c *Client) Run(ctx context.Context, command string, stdin io.Reader, stdout, stderr io.Writer, env ...string) (int, error) {
	s, err := c.Start(ctx, command, stderr, env...)
	if err != nil {
		return 0, err
	}
	if stdin == nil {
		s.Stdin.Close()
	} else {
		go s.feed(stdin)
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		s.drain(stdout, s.Stdout)
	}()
	s.await(copied)
	return s.Wait()
}
