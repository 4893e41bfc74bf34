package door

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

const (
	idleLimit     = 60 * time.Second // a connection without a session
	requestLimit  = 10 * time.Second // a session without a command
	flushLimit    = 10 * time.Second // the last bytes to a client that does not read
	goodbyeLimit  = 5 * time.Second  // from revoke until the connection is cut
	shutdownLimit = time.Second      // for the client to hang up by itself at shutdown
	missedProbes  = 3                // unanswered keepalives before a client is lost
	maxRefusing   = 256              // channels whose refusal is on its way
)

// A conn is one connection: the gate, the login, then its sessions.
//
// It ends in one of four ways. The client hangs up; nothing happens for idleLimit;
// cut, which loses what is in flight; or the process dies.
type conn struct {
	srv    *Server
	wire   *wire
	from   netip.AddrPort
	ctx    context.Context // ends with the connection
	cancel context.CancelCauseFunc
	login  login
	leave  func()         // gives the place before login back; may be called again
	grace  *time.Timer    // login time limit
	work   sync.WaitGroup // sessions, their key watchers, questions for a sign of life

	refusing atomic.Int32 // channels that are being rejected

	mu     sync.Mutex // protects the following
	who    keys.Identity
	peer   *ssh.ServerConn       // nil before the first session
	guests map[*Session]struct{} // that another raid has brought
	open   int                   // channels taken, until their session has ended
	alert  int                   // of these, the ones that have not seen their channel close
	busy   int                   // of these, the ones whose client waits for us
	idle   *time.Timer           // runs from login while busy is 0
	ending bool                  // no new sessions
	pulse  pulse
}

// A pulse is what is known of a client's being alive. It is a timer and not a goroutine:
// most clients are silent most of the time.
type pulse struct {
	timer  *time.Timer // nil before the first session
	seen   int64       // wire.received when it was last looked at
	missed int         // looks since then
	asking bool        // the last question is still on its way
}

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{srv: s, from: origin(nc), leave: s.gate.giveBack}
	c.ctx, c.cancel = context.WithCancelCause(s.closing)
	c.wire = newWire(nc, s.buffers, c)
	c.login = login{
		ctx:       c.ctx,
		from:      c.from,
		authorize: s.cfg.Authorize,
		isRaid:    s.cfg.IsRaid,
		logf:      s.cfg.Logf,
		admitted:  c.admitted,
	}
	return c
}

// admit waits for a place among those that log in and starts the login's clock. The
// clock cuts the connection: gliderlabs wipes deadlines (defects j, p).
func (c *conn) admit() bool {
	source := sourceOf(c.from)
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.cfg.Grace)
	defer cancel()
	c.leave = func() {}
	if !c.srv.gate.enter(ctx, source) {
		return false
	}
	c.leave = sync.OnceFunc(func() { c.srv.gate.leave(source) })
	c.grace = time.AfterFunc(c.srv.cfg.Grace, func() { c.cut(ErrLost) })
	return true
}

// admitted ends the login, in the handshake's goroutine.
func (c *conn) admitted(who keys.Identity) {
	c.grace.Stop()
	c.leave()
	c.wire.trust()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who = who
	c.idle = time.AfterFunc(c.idleLimit(), func() { c.cut(ErrLost) })
}

// finish takes down what is left when the handshake failed or the client is gone, and
// waits for everything the connection started.
func (c *conn) finish() {
	c.mu.Lock()
	c.ending = true
	c.stopTimers()
	c.mu.Unlock()
	c.leave()
	c.wire.Close()
	c.work.Wait() // each session finds its own cause first
	c.wire.flushers.Wait()
	c.cancel(nil)
	c.login.report()
}

func (c *conn) stopTimers() {
	if c.grace != nil {
		c.grace.Stop()
	}
	if c.idle != nil {
		c.idle.Stop()
	}
	if c.pulse.timer != nil {
		c.pulse.timer.Stop()
	}
}

// cut ends the connection at once. Its sessions see cause, unless they have another.
func (c *conn) cut(cause error) {
	c.cancel(cause)
	c.wire.abort(cause)
}

// revoke ends the connection if it belongs to the key: sessions first, so that their
// handlers can say why. Of a connection of another raid's, only sessions of the key end.
func (c *conn) revoke(fingerprint string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.guests {
		if s.Who.Fingerprint == fingerprint {
			s.over(ErrRevoked)
		}
	}
	if c.who.Fingerprint != fingerprint || c.ending {
		return
	}
	c.ending = true
	c.cancel(ErrRevoked)
	wait := goodbyeLimit
	if c.busy == 0 {
		wait = 0
	}
	c.idle.Stop()
	c.idle = time.AfterFunc(wait, func() { c.cut(ErrRevoked) })
}

// retire makes the connection end soon after its last session, for Shutdown. Who has
// not logged in is cut.
func (c *conn) retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.idle == nil:
		c.wire.abort(ErrShutdown)
	case c.busy == 0:
		c.idle.Reset(shutdownLimit)
	}
}

func (c *conn) idleLimit() time.Duration {
	switch {
	case c.srv.closing.Err() != nil:
		return shutdownLimit
	case c.who.Role == keys.Door: // it ends the connection when another raid leads
		return carrierLimit
	}
	return idleLimit
}

// session runs one channel, in its own goroutine, until both sides have closed it.
func (c *conn) session(peer *ssh.ServerConn, nc ssh.NewChannel) {
	if !c.enter(peer) {
		c.refuse(nc)
		return
	}
	defer c.exit()
	defer c.srv.contain("session from " + c.from.String())
	p, ok := proven(peer.Permissions) // only the key that signed: defect e
	if !ok || p.who.Role == keys.Door {
		c.turnAway(nc, "not logged in")
		return
	}
	if c.srv.cfg.Route != nil {
		if c.relay(p, nc) {
			return
		}
		who, err := c.lookUp(p.key, c.from) // at login somebody else may have led, or nobody
		if err != nil {
			c.turnAway(nc, err.Error())
			return
		}
		p.who = who
	}
	ch, requests, err := nc.Accept()
	if err != nil {
		c.noticed()
		c.idleAgain()
		return
	}
	newSession(c, p.who, ch).run(requests)
}

// lookUp finds out who a key that was proved belongs to, now. Others wait for the answer
// (see Config.IsRaid).
func (c *conn) lookUp(key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
	l := login{ctx: c.ctx, from: from, authorize: c.srv.cfg.Authorize, logf: c.srv.cfg.Logf,
		last: ssh.FingerprintSHA256(plain(key))}
	who, err := l.lookUp(key)
	if err == nil && who.Role == keys.Door { // a raid has no sessions of its own
		err = errRefused
	}
	return who, err
}

// turnAway rejects a channel that was counted in.
func (c *conn) turnAway(nc ssh.NewChannel, why string) {
	c.noticed()
	c.idleAgain()
	nc.Reject(ssh.Prohibited, why)
}

// refuse rejects a channel. gliderlabs gives each a goroutine, and each waits while the
// client does not read: a client that opens channels without end is cut (defect k).
func (c *conn) refuse(nc ssh.NewChannel) {
	if c.refusing.Add(1) > maxRefusing {
		c.cut(ErrLost)
	}
	defer c.refusing.Add(-1)
	if c.srv.closing.Err() != nil {
		nc.Reject(ssh.ResourceShortage, "the server is stopping")
		return
	}
	nc.Reject(ssh.ResourceShortage, "too many sessions on this connection")
}

// enter counts a channel in; the first one starts the keepalive.
func (c *conn) enter(peer *ssh.ServerConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending || c.srv.closing.Err() != nil || c.open >= c.maxSessions() {
		return false
	}
	if c.peer == nil {
		c.peer = peer
		c.pulse.seen = c.wire.received.Load()
		c.pulse.timer = time.AfterFunc(c.srv.cfg.KeepAlive, c.keepAlive)
	}
	c.open++
	c.alert++
	c.busy++
	c.idle.Stop()
	c.work.Add(1)
	return true
}

// maxSessions is how many channels the connection may have; for another raid's, of whole
// classes of students, as good as any number.
func (c *conn) maxSessions() int {
	if c.who.Role == keys.Door {
		return maxCarried
	}
	return c.srv.cfg.MaxSessions
}

// idleAgain says that a session's client has all it will get.
func (c *conn) idleAgain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy--; c.busy == 0 && !c.ending {
		c.idle.Reset(c.idleLimit())
	}
}

// noticed says that a session has seen its channel close.
func (c *conn) noticed() {
	c.mu.Lock()
	c.alert--
	c.mu.Unlock()
	c.wire.settled()
}

// unaware says whether any session is still to notice that its channel has closed.
func (c *conn) unaware() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.alert > 0
}

// exit counts a channel out.
func (c *conn) exit() {
	c.mu.Lock()
	c.open--
	c.mu.Unlock()
	c.work.Done()
}

// keepAlive asks a silent client for a sign of life and gives it up after the third
// question without one. Any byte counts: the answer of a client behind a slow line
// stands in a queue behind its upload.
func (c *conn) keepAlive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.wire.closed:
		return
	default:
	}
	if c.ending { // finish waits for work: no more of it
		return
	}
	p := &c.pulse
	p.timer.Reset(c.srv.cfg.KeepAlive)
	if now := c.wire.received.Load(); now != p.seen {
		p.seen, p.missed = now, 0
		return
	}
	if p.missed++; p.missed > missedProbes {
		p.timer.Stop()
		c.cut(ErrLost)
		return
	}
	if !p.asking {
		p.asking = true
		c.work.Go(c.ask)
	}
}

// ask asks the client for a sign of life, on behalf of keepAlive.
func (c *conn) ask() {
	c.alive()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pulse.asking = false
}

// alive asks the client for a reply and waits for it, or for the connection's end.
func (c *conn) alive() bool {
	_, _, err := c.peer.SendRequest("keepalive@openssh.com", true, nil)
	return err == nil
}

// whyClosed says why a channel of this connection has closed, when nobody here closed
// it. It is called as soon as the channel's requests end, which is also what happens
// to all channels when the connection dies.
//
// The wire holds back the end of the stream until the sessions have looked (see
// wire.ended). So if the end has come through, the connection died first. If not, the
// client closed the channel and the connection lives, or its goodbye ended it.
func (c *conn) whyClosed() error {
	died := c.wire.ended.Load()
	c.noticed()
	if !died && c.alive() {
		return ErrLeft
	}
	err := c.peer.Wait()
	if saidGoodbye(err) {
		return ErrLeft
	}
	if died || !hungUp(err) {
		return ErrLost
	}
	return ErrLeft // closed the channel, then hung up
}

// saidGoodbye recognises what ssh(1) sends when it ends on purpose: on Ctrl-C, TERM
// and HUP, and after its last command. The type is not exported; 11 is
// SSH_DISCONNECT_BY_APPLICATION, RFC 4253 §11.1.
func saidGoodbye(err error) bool {
	return err != nil && strings.HasPrefix(err.Error(), "ssh: disconnect, reason 11:")
}

// hungUp says that the connection ended as TCP connections do, not by a violation of
// the protocol.
func hungUp(err error) bool {
	var ne net.Error
	return errors.Is(err, errEOF) || errors.As(err, &ne)
}
