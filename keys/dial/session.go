package dial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// A Session is one running command. Stdout must be read to its end: what is not read
// stops the command's stderr too, for both share one window.
type Session struct {
	Stdin  io.WriteCloser // closing it ends the command's input, not the command
	Stdout io.Reader

	c       *Client
	ch      ssh.Channel
	stop    func() bool // ctx no longer ends the session
	wg      sync.WaitGroup
	settled chan struct{} // closed when the server has closed the channel and stderr is written
	gone    chan struct{} // closed a second after we ended the session early

	mu     sync.Mutex // protects the following
	status *uint32    // what the command exited with
	signal string     // or what it died of
	cause  error      // why we ended it ourselves
	outErr error      // what output was lost for
}

// Start starts a command. Its stderr is copied to stderr (nil: nowhere) while it
// runs. When ctx ends the session is closed at once. env are variables, NAME=VALUE, that
// the command is told; a server may refuse one, of which nothing is said. The caller must
// call Wait.
func (c *Client) Start(ctx context.Context, command string, stderr io.Writer, env ...string) (*Session, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	ch, reqs, err := c.conn.OpenChannel("session", nil)
	if err != nil {
		return nil, c.lost("open a session", err)
	}
	s := &Session{Stdin: stdin{ch}, c: c, ch: ch, settled: make(chan struct{}), gone: make(chan struct{})}
	s.Stdout = output{s, ch}
	s.wg.Go(func() { s.answer(reqs) })
	s.stop = context.AfterFunc(ctx, func() { s.fail(context.Cause(ctx)) })
	s.wg.Go(func() { s.drain(stderr, output{s, ch.Stderr()}) })
	go func() {
		s.wg.Wait()
		close(s.settled)
	}()
	for _, kv := range env { // one that is lost with the connection is lost with the command
		name, value, _ := strings.Cut(kv, "=")
		ch.SendRequest("env", false, ssh.Marshal(struct{ Name, Value string }{name, value}))
	}
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{command}))
	if err == nil && ok {
		return s, nil
	}
	ch.Close()
	s.stop()
	<-s.settled
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, c.lost("start a command", err)
	}
	return nil, errors.New("the server refused to start a command")
}

// answer takes the requests of the server until the channel is closed.
func (s *Session) answer(reqs <-chan *ssh.Request) {
	for r := range reqs {
		s.mu.Lock()
		switch r.Type {
		case "exit-status":
			var p struct{ Status uint32 }
			if ssh.Unmarshal(r.Payload, &p) == nil {
				s.status = &p.Status
			}
		case "exit-signal":
			var p struct {
				Signal  string
				Core    bool
				Message string
				Lang    string
			}
			if ssh.Unmarshal(r.Payload, &p) == nil {
				s.signal = p.Signal
			}
		}
		s.mu.Unlock()
		if r.WantReply {
			r.Reply(false, nil)
		}
	}
}

// feed sends r as the command's input. An EOF from the channel means that the command
// wants no more.
func (s *Session) feed(r io.Reader) {
	if _, err := io.Copy(s.Stdin, r); err != nil && !errors.Is(err, io.EOF) {
		s.fail(fmt.Errorf("send input: %w", err))
		return
	}
	s.Stdin.Close()
}

// drain writes what the command says to w. The status of a command whose output was
// lost is no result, even if it has arrived.
func (s *Session) drain(w io.Writer, r io.Reader) {
	if w == nil {
		w = io.Discard
	}
	if _, err := io.Copy(w, r); err != nil {
		err = fmt.Errorf("write output: %w", err)
		s.mu.Lock()
		s.outErr = errors.Join(s.outErr, err)
		s.mu.Unlock()
		s.fail(err)
	}
}

// Signal sends the command a signal by its SSH name: "INT", "TERM" (RFC 4254 §6.9).
// The server need not do anything about it.
func (s *Session) Signal(name string) error {
	_, err := s.ch.SendRequest("signal", false, ssh.Marshal(struct{ Signal string }{name}))
	return err
}

// Close ends the session on purpose, whatever the command is doing; raid takes it as
// a Ctrl-C. It does not wait for the server and may be called more than once.
func (s *Session) Close() { s.fail(context.Canceled) }

// fail ends the session because of err, unless it has ended.
func (s *Session) fail(err error) {
	s.mu.Lock()
	if s.cause != nil || s.status != nil {
		s.mu.Unlock()
		return
	}
	s.cause = err
	s.mu.Unlock()
	time.AfterFunc(lingerFor, func() { close(s.gone) })
	s.c.leave() // before the close, or raid's question could come first
	s.ch.Close()
}

// Wait waits until the command has ended and its stderr is written, and returns its
// exit status. Stdout must be read to the end first. The error is what the session
// was ended for, or wraps ErrLost. It may be called more than once.
func (s *Session) Wait() (int, error) {
	s.await(s.settled)
	s.stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.cause != nil:
		return 0, s.cause
	case s.outErr != nil:
		return 0, s.outErr
	case s.status != nil:
		return int(*s.status), nil
	case s.signal != "":
		return 0, fmt.Errorf("the command was killed by signal %s", s.signal)
	}
	return 0, s.c.lost("wait for the command", io.EOF)
}

// await waits for done. Once we have ended the session it waits a second at most: a
// dead network must not hold up who wants to leave.
func (s *Session) await(done <-chan struct{}) {
	select {
	case <-done:
	case <-s.gone:
	}
}

// lost dresses up err: nearly always the connection has ended and knows more.
func (c *Client) lost(doing string, err error) error {
	select {
	case <-c.done:
		if c.err != nil {
			err = c.err
		}
		return fmt.Errorf("%s: %w (%w)", doing, ErrLost, err)
	default:
	}
	var open *ssh.OpenChannelError
	if errors.As(err, &open) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w (%w)", doing, ErrLost, err)
}

// stdin is the writing half of a channel; closing it sends EOF only.
type stdin struct{ ch ssh.Channel }

func (s stdin) Write(p []byte) (int, error) { return s.ch.Write(p) }
func (s stdin) Close() error                { return s.ch.CloseWrite() }

// output is a reading half of a channel. Once nobody waits for it, nothing more comes
// out of it: the writer behind it may not exist any more.
type output struct {
	s *Session
	r io.Reader
}

func (o output) Read(p []byte) (int, error) {
	n, err := o.r.Read(p)
	select {
	case <-o.s.gone:
		return 0, io.EOF
	default:
		return n, err
	}
}
