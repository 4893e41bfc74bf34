package door

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
)

// statusPanic is the exit status of a handler that panics: raid's fault.
const statusPanic = 125

// ErrNoOutput is what Write returns when the client has closed its standard output
// and said so, as in `ssh host logs 17 | head`. Stderr still works.
var ErrNoOutput = errors.New("client closed its standard output")

var (
	errSessionOver = errors.New("session is over")
	errKeysWatched = errors.New("stdin is read by WatchKeys")
)

// A Session is one command of one client, as Config.Handle sees it. It is a Reader of
// the client's stdin and a Writer to its stdout.
//
// Reads may come from one goroutine; writes to either stream from any number. Writes
// block while the client does not read, for as long as it keeps the connection alive,
// so whoever produces output must not depend on them. They fail once the channel is
// closed and once the handler has returned.
type Session struct {
	ID      string         // of this process, for logs
	Who     keys.Identity  // whose key signed
	From    netip.AddrPort // where from
	User    string         // login name as typed: a stranger's text, for the log only
	Command string         // exec's text, as sent; "" for a shell
	Shell   bool           // no command was given

	conn    *conn
	carried *carried // nil for a client of this door
	over    context.CancelCauseFunc
	ch      ssh.Channel
	out     stream
	err     stream
	env     map[string]string
	envSize int
	pty     *PTY
	size    atomic.Uint64
	resized chan struct{}
	signals chan string
	watched atomic.Bool
}

// A PTY describes the client's terminal.
type PTY struct {
	Term string // a plain name, "dumb" if the client sent none or an odd one
	size *atomic.Uint64
}

// Size is the terminal's width and height now, each at most 4096; 0 means unknown.
func (p PTY) Size() (columns, rows int) {
	v := p.size.Load()
	return int(v >> 32), int(uint32(v))
}

func newSession(c *conn, who keys.Identity, ch ssh.Channel) *Session {
	s := &Session{
		over:    func(error) {},
		ID:      strconv.FormatUint(c.srv.sessions.Add(1), 10),
		Who:     who,
		From:    c.from,
		User:    c.peer.User(),
		conn:    c,
		ch:      ch,
		resized: make(chan struct{}, 1),
		signals: make(chan string, 4),
	}
	s.out.open(ch)
	s.err.open(ch.Stderr())
	return s
}

// Env is the value of a variable the client has set before its command: GIT_PROTOCOL,
// LANG, TERM, LC_* or RAI_*. "" if it has not.
func (s *Session) Env(name string) string { return s.env[name] }

// PTY describes the client's terminal; false if it asked for none.
func (s *Session) PTY() (PTY, bool) {
	if s.pty == nil {
		return PTY{}, false
	}
	return *s.pty, true
}

// Resized receives a value when the terminal's size has changed since the last one.
func (s *Session) Resized() <-chan struct{} { return s.resized }

// Signals receives "INT", "TERM" and "HUP": signals the client sends, and INT for each
// byte 3 (Ctrl-C) that Read or WatchKeys meets on a terminal. What to do about it is
// the handler's decision. Signals that nobody receives are dropped.
func (s *Session) Signals() <-chan string { return s.signals }

// WatchKeys reads stdin in the session's own goroutine, for handlers with no use for
// it but to hear of Ctrl-C. Everything else that is typed is dropped; Read fails from
// now on. The goroutine ends with the channel.
func (s *Session) WatchKeys() {
	if s.watched.Swap(true) {
		return
	}
	s.conn.work.Go(func() {
		defer s.conn.srv.contain("session " + s.ID)
		var buf [256]byte
		for {
			if _, err := s.read(buf[:]); err != nil {
				return
			}
		}
	})
}

// Raw ends the translation of line ends for a terminal, on both streams.
func (s *Session) Raw() {
	s.out.raw.Store(true)
	s.err.raw.Store(true)
}

// Read reads the client's stdin. Byte 3 of a terminal is passed on and also sent to
// Signals.
func (s *Session) Read(p []byte) (int, error) {
	if s.watched.Load() {
		return 0, errKeysWatched
	}
	return s.read(p)
}

func (s *Session) read(p []byte) (int, error) {
	n, err := s.ch.Read(p)
	if s.pty != nil && bytes.IndexByte(p[:n], 3) >= 0 {
		s.signal("INT")
	}
	return n, err
}

// Write writes to the client's stdout. On a terminal \n becomes \r\n.
func (s *Session) Write(p []byte) (int, error) { return s.out.Write(p) }

// Stderr writes to the client's stderr. On a terminal \n becomes \r\n (defect o).
func (s *Session) Stderr() io.Writer { return &s.err }

// run answers the channel's requests until it closes, then waits for the handler. It
// never waits for the handler while there are requests (defects g, h).
func (s *Session) run(requests <-chan *ssh.Request) {
	ctx, cancel := context.WithCancelCause(s.conn.ctx) // of this channel: defect f
	defer cancel(nil)
	defer s.conn.carry(s, cancel)()
	waiting := time.AfterFunc(requestLimit, func() { s.ch.Close(); s.conn.idleAgain() })
	var over chan struct{} // the handler's end
	for r := range requests {
		ok := s.prepare(r, over != nil)
		starts := ok && (r.Type == "exec" || r.Type == "shell")
		if starts && !waiting.Stop() {
			starts, ok = false, false // too late: the channel is being closed
		}
		r.Reply(ok, nil)
		if starts {
			over = make(chan struct{})
			go func() { defer close(over); s.handle(ctx) }()
		}
	}
	if over == nil {
		s.conn.noticed()
		if waiting.Stop() {
			s.conn.idleAgain()
		}
		return
	}
	select {
	case <-over:
		s.conn.noticed()
	default:
		cancel(s.whyClosed())
		<-over
	}
}

// prepare takes in one request and says how to answer it. Agent forwarding, X11,
// subsystems and all that is unknown are refused (defect m).
func (s *Session) prepare(r *ssh.Request, started bool) bool {
	switch r.Type {
	case leftRequest:
		return s.carried != nil && s.carried.left(s, r.Payload)
	case "window-change":
		return s.resize(r.Payload)
	case "signal":
		name, ok := parseSignal(r.Payload)
		if ok {
			s.signal(name)
		}
		return ok
	case "eow@openssh.com":
		s.out.fail(ErrNoOutput)
		return true
	}
	if started {
		return false
	}
	switch r.Type {
	case "exec":
		command, ok := parseExec(r.Payload)
		s.Command = command
		return ok
	case "shell":
		s.Shell = true
		return true
	case "env":
		return s.setEnv(r.Payload)
	case "pty-req":
		return s.openPTY(r.Payload)
	}
	return false
}

// setEnv keeps an allowed variable while there is room (defect l).
func (s *Session) setEnv(payload []byte) bool {
	name, value, ok := parseEnv(payload)
	if !ok || s.envSize+len(payload) > maxEnv || len(s.env) >= maxEnvVars {
		return false
	}
	if s.env == nil {
		s.env = map[string]string{}
	}
	s.env[name] = value
	s.envSize += len(payload)
	return true
}

func (s *Session) openPTY(payload []byte) bool {
	term, size, ok := parsePTY(payload)
	if !ok || s.pty != nil {
		return false
	}
	s.size.Store(size)
	s.pty = &PTY{Term: term, size: &s.size}
	s.out.tty, s.err.tty = true, true
	return true
}

func (s *Session) resize(payload []byte) bool {
	size, ok := parseResize(payload)
	if !ok {
		return false
	}
	s.size.Store(size)
	select {
	case s.resized <- struct{}{}:
	default: // one is waiting already
	}
	return true
}

func (s *Session) signal(name string) {
	select {
	case s.signals <- name:
	default:
	}
}

// handle runs the handler and ends the session with its status, whatever happens
// (defects c, i).
func (s *Session) handle(ctx context.Context) {
	defer s.conn.idleAgain()
	code, ok := s.call(ctx)
	if !ok {
		code = statusPanic
		io.WriteString(s.Stderr(), "raid: internal error in session "+s.ID+"\n")
	}
	s.end(code)
}

// call runs the handler. ok is false if it panicked.
func (s *Session) call(ctx context.Context) (code int, ok bool) {
	defer s.conn.srv.contain("session " + s.ID)
	return s.conn.srv.cfg.Handle(ctx, s), true
}

// end sends the exit status, EOF and close, in this order: RFC 4254 §6.10. Some
// clients take EOF for the end and a status that comes after it for lost. A client
// that does not even take these few bytes is cut off.
func (s *Session) end(code int) {
	stuck := time.AfterFunc(flushLimit, func() { s.conn.cut(ErrLost) })
	defer stuck.Stop()
	s.out.stop()
	s.err.stop()
	s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{uint32(code)}))
	s.ch.CloseWrite()
	s.ch.Close()
}

// Sizes of the packets that output is sent in. golang.org/x/crypto/ssh keeps buffers
// of the largest packet a channel has ever sent, so live output goes in small ones;
// whoever writes a lot at once gets full ones. With its header, padding and tag a small
// one just fits into 4 KiB: the allocator's next size is a fifth more, twice.
const (
	livePacket = 4<<10 - 64
	bulkPacket = 32 << 10
)

// A stream is stdout or stderr of a session.
type stream struct {
	to  io.Writer
	tty bool // set before the handler starts
	raw atomic.Bool
	bad atomic.Pointer[error] // why writes fail; nil while they do not

	turn chan struct{} // holds one token; a Write takes it, perhaps for hours
	last byte          // of the previous Write, for line ends
}

func (w *stream) open(to io.Writer) {
	w.to, w.turn = to, make(chan struct{}, 1)
	w.turn <- struct{}{}
}

// fail makes writes fail with err, from the next packet on.
func (w *stream) fail(err error) { w.bad.CompareAndSwap(nil, &err) }

// stop makes writes fail and waits for one that is under way.
func (w *stream) stop() {
	w.fail(errSessionOver)
	<-w.turn
	w.turn <- struct{}{}
}

func (w *stream) Write(p []byte) (int, error) {
	<-w.turn
	defer func() { w.turn <- struct{}{} }()
	if w.tty && !w.raw.Load() {
		return w.writeLines(p)
	}
	size := livePacket
	if len(p) >= bulkPacket {
		size = bulkPacket
	}
	n := 0
	for n < len(p) {
		if bad := w.bad.Load(); bad != nil {
			return n, *bad
		}
		k, err := w.to.Write(p[n:min(len(p), n+size)])
		if n += k; err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeLines writes p with \r before each \n that has none.
func (w *stream) writeLines(p []byte) (int, error) {
	var packet [livePacket]byte
	n := 0
	for n < len(p) {
		if bad := w.bad.Load(); bad != nil {
			return n, *bad
		}
		used, made := w.translate(packet[:], p[n:])
		if _, err := w.to.Write(packet[:made]); err != nil {
			return n, err
		}
		n += used
	}
	return n, nil
}

// translate fills dst from src and says how many bytes of each it used.
func (w *stream) translate(dst, src []byte) (used, made int) {
	for used < len(src) && made+2 <= len(dst) {
		c := src[used]
		if c == '\n' && w.last != '\r' {
			dst[made] = '\r'
			made++
		}
		dst[made] = c
		made++
		used++
		w.last = c
	}
	return used, made
}
