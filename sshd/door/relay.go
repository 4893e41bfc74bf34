package door

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"
)

// A relay is one session of a client that the raid at the other end of a link handles.
// Bytes and requests pass as they come; the exit status follows the last byte of output.
type relay struct {
	c        *conn
	down, up ssh.Channel // to the client, to the leader
	tty      atomic.Bool
	asking   sync.Mutex // held from a request of the client's until its reply is sent
}

// statusLost is the exit status of a session whose leader went away: try again later.
const statusLost = 75

const lostWords = "raid: the raid that handled this is gone, and another takes over; jobs go on\n" +
	"raid: run the same command again in a few seconds (attach JOB, for a job you were following)\n"

// relay passes a channel on to where Route says, and returns when it is over; false, with
// nothing done, if it is to be handled here.
func (c *conn) relay(p proof, nc ssh.NewChannel) bool {
	up, ups, err := c.openUp(caller{Key: p.key.Marshal(), From: c.from, User: c.peer.User()})
	if up == nil && err == nil {
		return false
	}
	if err != nil {
		c.turnAway(nc, err.Error())
		return true
	}
	down, downs, err := nc.Accept()
	if err != nil {
		up.Close()
		c.noticed()
		c.idleAgain()
		return true
	}
	r := &relay{c: c, down: down, up: up}
	r.run(downs, ups)
	return true
}

// openUp opens a channel to whoever leads; nil, nil if the session is to be handled here.
// The error is why the leader refuses the client.
func (c *conn) openUp(from caller) (ssh.Channel, <-chan *ssh.Request, error) {
	ctx, cancel := context.WithTimeout(c.ctx, requestLimit)
	defer cancel()
	for {
		link := c.srv.cfg.Route(ctx)
		if link == nil {
			return nil, nil, nil
		}
		up, ups, err := link.open(from)
		var no *ssh.OpenChannelError
		switch {
		case err == nil:
			return up, ups, nil
		case errors.As(err, &no) && no.Reason == ssh.Prohibited:
			return nil, nil, errors.New(no.Message)
		}
		select { // the link is about to break, or the leader to stop
		case <-link.Done():
		case <-ctx.Done():
			return nil, nil, nil
		}
	}
}

func (r *relay) run(downs, ups <-chan *ssh.Request) {
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() { io.Copy(r.up, r.down); r.up.CloseWrite() }) // ends with down
	over := make(chan struct{})
	work.Go(func() { defer close(over); r.answer(ups) })
	stop := context.AfterFunc(r.c.ctx, func() { r.leave(context.Cause(r.c.ctx)) })
	defer stop()
	for q := range downs {
		r.asking.Lock()
		q.Reply(r.pass(q), nil)
		r.asking.Unlock()
	}
	select {
	case <-over:
		r.c.noticed()
	default:
		r.leave(r.c.whyClosed())
		r.up.Close()
	}
}

// pass sends a request of the client's to the leader and says how it was answered.
func (r *relay) pass(q *ssh.Request) bool {
	switch q.Type {
	case "pty-req":
		r.tty.Store(true)
	case "exec", "shell", "env", "window-change", "signal", "eow@openssh.com":
	default:
		return false // among them what only raids say to each other
	}
	ok, err := r.up.SendRequest(q.Type, q.WantReply, q.Payload)
	return ok && err == nil
}

// leave tells the leader why the client went.
func (r *relay) leave(cause error) {
	for word, c := range leavings {
		if errors.Is(cause, c) {
			r.up.SendRequest(leftRequest, false, []byte(word))
		}
	}
}

// answer brings what the leader has to say to the client, and ends the session.
func (r *relay) answer(ups <-chan *ssh.Request) {
	defer r.c.idleAgain()
	var out sync.WaitGroup
	out.Go(func() { io.Copy(r.down, r.up) })
	out.Go(func() { io.Copy(r.down.Stderr(), r.up.Stderr()) })
	status, told := uint32(statusLost), false
	for q := range ups {
		if q.Type == "exit-status" && len(q.Payload) == 4 {
			status, told = binary.BigEndian.Uint32(q.Payload), true
		}
		q.Reply(false, nil)
	}
	out.Wait() // the leader has closed the channel: this ends once the client has read all
	stuck := time.AfterFunc(flushLimit, func() { r.c.cut(ErrLost) })
	defer stuck.Stop()
	r.asking.Lock() // a short command may be over before its own request is answered
	defer r.asking.Unlock()
	if !told {
		text := lostWords
		if r.tty.Load() {
			text = strings.ReplaceAll(text, "\n", "\r\n")
		}
		io.WriteString(r.down.Stderr(), text)
	}
	r.down.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{status}))
	r.down.CloseWrite()
	r.down.Close()
	r.up.Close()
}
