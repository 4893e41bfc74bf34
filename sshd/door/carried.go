package door

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// What raids say to each other, beside what a session's own channel has (names as
// RFC 4250 §4.6.1 has them for what is not standard):
//
//	who@raid      a global request: who does this key belong to? The answer is an answer
//	session@raid  a channel that is a client's session; its extra data is a caller
//	left@raid     a request on it: the client's part is over, and how it ended
const (
	whoRequest     = "who@raid"
	carriedChannel = "session@raid"
	leftRequest    = "left@raid"
)

const (
	maxCarried   = 1 << 16        // sessions of one other raid
	carrierLimit = 24 * time.Hour // the connection of another raid, without a session
)

// A caller is a client of another raid: the key that it has proved there, and from where.
type caller struct {
	Key  []byte         `json:"key"` // SSH wire form
	From netip.AddrPort `json:"from"`
	User string         `json:"user,omitempty"` // the login name
}

// An answer says who a key belongs to, or why it is refused.
type answer struct {
	Who     keys.Identity `json:"who"`
	Refused string        `json:"refused,omitempty"`
}

// leavings are the causes of a client's going, as they are told.
var leavings = map[string]error{"left": ErrLeft, "lost": ErrLost, "shutdown": ErrShutdown, "revoked": ErrRevoked}

// A carried is what a session has that another raid has brought.
type carried struct {
	cause atomic.Pointer[error] // why the client went; nil while it has not
}

// left notes why the client went. Where its channel is still open, the session ends now,
// and may say a last word.
func (c *carried) left(s *Session, payload []byte) bool {
	cause, ok := leavings[string(payload)]
	if ok && c.cause.CompareAndSwap(nil, &cause) {
		s.over(cause)
	}
	return ok
}

// whyClosed says why the session's channel has closed, when nobody here closed it.
func (s *Session) whyClosed() error {
	if s.carried == nil {
		return s.conn.whyClosed()
	}
	s.conn.noticed()
	if cause := s.carried.cause.Load(); cause != nil {
		return *cause
	}
	return ErrLost // its raid, or the way to it
}

// carry enters a session that another raid has brought into the list of its connection,
// and returns what takes it out again.
func (c *conn) carry(s *Session, over context.CancelCauseFunc) (done func()) {
	if s.carried == nil {
		return func() {}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.over = over
	if c.guests == nil {
		c.guests = map[*Session]struct{}{}
	}
	c.guests[s] = struct{}{}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.guests, s)
	}
}

// carrier reports whether the connection is another raid's.
func (c *conn) carrier() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.who.Role == keys.Door
}

// look finds out who a caller is.
func (c *conn) look(data []byte) (who keys.Identity, from caller, err error) {
	if err := json.Unmarshal(data, &from); err != nil {
		return who, from, err
	}
	key, err := ssh.ParsePublicKey(from.Key)
	if err != nil {
		return who, from, err
	}
	who, err = c.lookUp(key, from.From)
	return who, from, err
}

// answerWho answers another raid that asks for a key.
func (c *conn) answerWho(data []byte) (bool, []byte) {
	if !c.carrier() {
		return false, nil
	}
	var a answer
	var err error
	if a.Who, _, err = c.look(data); err != nil {
		a = answer{Refused: err.Error()}
	}
	b, err := json.Marshal(a)
	return err == nil, b
}

// receive runs a session that another raid has brought.
func (c *conn) receive(peer *ssh.ServerConn, nc ssh.NewChannel) {
	if !c.enter(peer) {
		c.refuse(nc)
		return
	}
	defer c.exit()
	defer c.srv.contain("session of another raid")
	if p, ok := proven(peer.Permissions); !ok || p.who.Role != keys.Door {
		c.turnAway(nc, "not logged in")
		return
	}
	who, from, err := c.look(nc.ExtraData())
	if err != nil {
		c.turnAway(nc, err.Error())
		return
	}
	ch, requests, err := nc.Accept()
	if err != nil {
		c.noticed()
		c.idleAgain()
		return
	}
	s := newSession(c, who, ch)
	s.carried, s.From, s.User = &carried{}, from.From, from.User
	s.run(requests)
}

// errNoAnswer: another raid answered nonsense.
var errNoAnswer = errors.New("the leading raid did not answer")
