package door

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// A Link is a connection to the raid that leads. Its methods are safe for concurrent
// use. Whoever dialled it closes it; one that broke refuses everything.
type Link struct {
	conn ssh.Conn
	work sync.WaitGroup
	done chan struct{} // closed when the connection has ended
}

// linkProbe is how often a link asks for a sign of life, and linkDead how long it waits
// for one: a machine that lost its power says no goodbye.
const (
	linkProbe = time.Second
	linkDead  = 3 * time.Second
)

// Dial connects to the raid at addr, which must prove one of the deployment's host keys,
// with this raid's own key, and be glad to see it. ctx bounds the dial only.
func Dial(ctx context.Context, addr string, own ssh.Signer, host ssh.PublicKey) (*Link, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("link to %s: %w", addr, err)
	}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	conn, chans, reqs, err := ssh.NewClientConn(nc, addr, &ssh.ClientConfig{
		Config:            (&login{}).config().Config,
		User:              "raid",
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(own)},
		HostKeyCallback:   ssh.FixedHostKey(host),
		HostKeyAlgorithms: []string{host.Type()},
	})
	if !stop() && err == nil {
		conn.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("link to %s: %w", addr, err)
	}
	l := &Link{conn: conn, done: make(chan struct{})}
	l.work.Go(func() { conn.Wait(); close(l.done) })
	l.work.Go(func() { ssh.DiscardRequests(reqs) })
	l.work.Go(func() {
		for nc := range chans {
			nc.Reject(ssh.Prohibited, "no channels to a door")
		}
	})
	l.work.Go(l.probe)
	if ok, _, err := conn.SendRequest(whoRequest, true, nil); !ok || err != nil {
		l.Close()
		return nil, fmt.Errorf("link to %s: %w", addr, cmp.Or(err, errStranger))
	}
	return l, nil
}

// errStranger: the other raid took us for somebody else. It may not have heard of us yet.
var errStranger = errors.New("it does not know this raid for one of its deployment")

// probe asks the other side for signs of life and cuts the link when they stay out.
func (l *Link) probe() {
	tick := time.NewTicker(linkProbe)
	defer tick.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-tick.C:
		}
		dead := time.AfterFunc(linkDead, func() { l.conn.Close() })
		_, _, err := l.conn.SendRequest("keepalive@openssh.com", true, nil)
		dead.Stop()
		if err != nil {
			return
		}
	}
}

// Done is closed when the link has ended, by whatever cause.
func (l *Link) Done() <-chan struct{} { return l.done }

// Close ends the link, the sessions on it, and returns when its goroutines have.
func (l *Link) Close() error {
	err := l.conn.Close()
	l.work.Wait()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// Who asks the leader who a key belongs to, as Config.Authorize would. A leader that
// does not answer is given up with the link.
func (l *Link) Who(key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
	ask, err := json.Marshal(caller{Key: key.Marshal(), From: from})
	if err != nil {
		return keys.Identity{}, err
	}
	ok, reply, err := l.conn.SendRequest(whoRequest, true, ask)
	if err != nil {
		return keys.Identity{}, fmt.Errorf("ask who a key belongs to: %w", err)
	}
	var a answer
	if !ok || json.NewDecoder(bytes.NewReader(reply)).Decode(&a) != nil {
		return keys.Identity{}, errNoAnswer
	}
	if a.Refused != "" {
		return keys.Identity{}, &RefusedError{a.Refused}
	}
	return a.Who, nil
}

// A RefusedError says that the leader refuses a key.
type RefusedError struct{ Why string }

func (e *RefusedError) Error() string { return e.Why }

// open opens a session of a client at the leader.
func (l *Link) open(from caller) (ssh.Channel, <-chan *ssh.Request, error) {
	extra, err := json.Marshal(from)
	if err != nil {
		return nil, nil, err
	}
	return l.conn.OpenChannel(carriedChannel, extra)
}
