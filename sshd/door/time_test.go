package door

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"
)

// A hall is a listener whose connections are pipes, so that time can be false.
type hall struct {
	ring chan net.Conn
	once sync.Once
	shut chan struct{}
}

func newHall() *hall { return &hall{ring: make(chan net.Conn), shut: make(chan struct{})} }

func (h *hall) Accept() (net.Conn, error) {
	select {
	case nc := <-h.ring:
		return nc, nil
	case <-h.shut:
		return nil, net.ErrClosed
	}
}

func (h *hall) Close() error   { h.once.Do(func() { close(h.shut) }); return nil }
func (h *hall) Addr() net.Addr { return place("192.0.2.1:22") }

type place string

func (p place) Network() string { return "tcp" }
func (p place) String() string  { return string(p) }

// A line is a pipe with an address.
type line struct {
	net.Conn
	from place
}

func (l *line) RemoteAddr() net.Addr { return l.from }

// enter rings at the door and returns the client's side.
func (h *hall) enter(from string) *line {
	client, server := net.Pipe()
	h.ring <- &line{server, place(from)}
	return &line{client, "192.0.2.1:22"}
}

// A stopper is a client's side that hears nothing more once stop is closed.
type stopper struct {
	net.Conn
	stop chan struct{}
	gone chan struct{}
}

func (s *stopper) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	select {
	case <-s.stop:
		<-s.gone
		return 0, io.EOF
	default:
		return n, err
	}
}

// visit starts a server on a hall, in the bubble of t.
func visit(t *testing.T, cfg Config) (*house, *hall) {
	t.Helper()
	h, l := build(t, cfg), newHall()
	h.serve(t, l)
	return h, l
}

func (h *house) login(t *testing.T, nc net.Conn) *ssh.Client {
	t.Helper()
	c, chans, reqs, err := ssh.NewClientConn(nc, "", clientConfig("rai", h.ada))
	if err != nil {
		t.Fatal(err)
	}
	return ssh.NewClient(c, chans, reqs)
}

// after reports how long do takes.
func after(do func()) time.Duration {
	start := time.Now()
	do()
	return time.Since(start)
}

// Defects j, p: the time to log in is limited, for the silent and for the slow.
func TestGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := visit(t, Config{})
		silent := l.enter("192.0.2.7:1")
		got := after(func() { io.Copy(io.Discard, silent) })
		if got != 30*time.Second {
			t.Errorf("a silent client is cut after %v, want 30s", got)
		}
		slow := l.enter("192.0.2.7:2")
		done := make(chan bool)
		go func() {
			defer close(done)
			for _, err := io.WriteString(slow, "S"); err == nil; _, err = io.WriteString(slow, "S") {
				time.Sleep(time.Second)
			}
		}()
		got = after(func() { io.Copy(io.Discard, slow) })
		<-done
		if got != 30*time.Second {
			t.Errorf("a slow client is cut after %v, want 30s", got)
		}
		synctest.Wait()
		if len(h.gate.slots) != 1 || len(h.gate.sources) != 0 { // 1: the next Accept's
			t.Errorf("%d slots and %d sources still taken", len(h.gate.slots)-1, len(h.gate.sources))
		}
	})
}

// A connection without a session ends after a minute, one with a session does not.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running := make(chan bool, 1)
		release := make(chan bool)
		cfg := Config{Handle: func(ctx context.Context, s *Session) int { running <- true; <-release; return 0 }}
		h, l := visit(t, cfg)
		c := h.login(t, l.enter("192.0.2.7:1"))
		if got := after(func() { c.Wait() }); got != time.Minute {
			t.Errorf("a client without sessions is cut after %v, want 1m", got)
		}
		c = h.login(t, l.enter("192.0.2.7:2"))
		s := session(t, c)
		if err := s.Start("x"); err != nil {
			t.Fatal(err)
		}
		<-running
		time.Sleep(10 * time.Minute)
		release <- true
		if err := s.Wait(); err != nil {
			t.Errorf("a silent session ended with %v", err)
		}
		if got := after(func() { c.Wait() }); got != time.Minute {
			t.Errorf("after its last session a client is cut after %v, want 1m", got)
		}
	})
}

// A session without a command ends after ten seconds; its connection goes the same
// way as one without a session, even if the client never closes the channel.
func TestNoCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := visit(t, Config{})
		c := h.login(t, l.enter("192.0.2.7:1"))
		_, reqs, err := c.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := after(func() { <-reqs }); got != 10*time.Second {
			t.Errorf("a session without a command is closed after %v, want 10s", got)
		}
		if got := after(func() { c.Wait() }); got != time.Minute {
			t.Errorf("then the connection is cut after %v, want 1m", got)
		}
	})
}

// A client that answers nothing to three keepalives is lost; a silent one that answers is not.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running, cause := make(chan bool, 1), make(chan error, 1)
		cfg := Config{Handle: func(ctx context.Context, s *Session) int {
			running <- true
			<-ctx.Done()
			cause <- context.Cause(ctx)
			return 0
		}}
		h, l := visit(t, cfg)
		nc := &stopper{Conn: l.enter("192.0.2.7:1"), stop: make(chan struct{}), gone: make(chan struct{})}
		c := h.login(t, nc)
		if err := session(t, c).Start("x"); err != nil {
			t.Fatal(err)
		}
		<-running
		time.Sleep(time.Hour) // silent, but it answers
		select {
		case err := <-cause:
			t.Fatalf("a silent client that answers ended with %v", err)
		default:
		}
		close(nc.stop)
		var got error
		took := after(func() { got = <-cause })
		if got != ErrLost || took < 45*time.Second || took > 75*time.Second {
			t.Errorf("a dead client: %v after %v, want %v after 45s to 75s", got, took, ErrLost)
		}
		close(nc.gone)
	})
}

// A client that takes no bytes cannot hold up the end of a session for ever.
func TestStuckFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running := make(chan chan bool)
		wrote := make(chan error, 1)
		cfg := Config{KeepAlive: time.Hour, Handle: func(ctx context.Context, s *Session) int {
			release := make(chan bool)
			running <- release
			<-release
			go func() { // a writer the handler does not wait for, against the rules
				_, err := io.Copy(s, zeros{})
				wrote <- err
			}()
			<-release
			return 0
		}}
		h, l := visit(t, cfg)
		nc := &stopper{Conn: l.enter("192.0.2.7:1"), stop: make(chan struct{}), gone: make(chan struct{})}
		s := session(t, h.login(t, nc))
		if err := s.Start("x"); err != nil {
			t.Fatal(err)
		}
		release := <-running
		close(nc.stop)
		release <- true
		synctest.Wait() // the writer is stuck
		release <- true
		var err error
		if got := after(func() { err = <-wrote }); got != flushLimit || err == nil {
			t.Errorf("a stuck client is cut after %v (%v), want %v", got, err, flushLimit)
		}
		close(nc.gone)
	})
}

// A client that opens channels without end and does not read the refusals is cut.
func TestChannelFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l := visit(t, Config{})
		nc := &stopper{Conn: l.enter("192.0.2.7:1"), stop: make(chan struct{}), gone: make(chan struct{})}
		c := h.login(t, nc)
		close(nc.stop)
		var opens sync.WaitGroup
		for range 20 * maxRefusing {
			opens.Go(func() { c.OpenChannel("session", make([]byte, 100)) })
		}
		synctest.Wait()
		if n := len(h.connections()); n != 0 {
			t.Errorf("%d connections are left, want 0", n)
		}
		close(nc.gone)
		opens.Wait()
	})
}

// Defect k: past the total nobody is accepted; past a source's share, only others are.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{MaxPreauth: 3, MaxPreauthPerSource: 2}
		h, l := visit(t, cfg)
		entered := func(from string) chan *line {
			in := make(chan *line, 1)
			go func() { in <- l.enter(from) }()
			synctest.Wait()
			return in
		}
		greeted := func(nc net.Conn) chan bool {
			ok := make(chan bool, 1)
			go func() { _, err := io.ReadFull(nc, make([]byte, 8)); ok <- err == nil }()
			synctest.Wait()
			return ok
		}
		want := func(what string, got, want int) {
			t.Helper()
			if got != want {
				t.Errorf("%s: %d, want %d", what, got, want)
			}
		}
		a1, a2 := <-entered("192.0.2.7:1"), <-entered("192.0.2.7:2")
		want("greeted first", len(greeted(a1)), 1)
		want("greeted second", len(greeted(a2)), 1)
		a3 := <-entered("192.0.2.7:3") // accepted, but aside
		aside := greeted(a3)
		want("greeted third of a source", len(aside), 0)
		b1 := <-entered("[2001:db8::1]:1")
		want("greeted other source", len(greeted(b1)), 1)
		late := entered("198.51.100.1:1")
		want("accepted past the total", len(late), 0)
		a1.Close() // its place goes to the one aside
		synctest.Wait()
		want("greeted third of a source, later", len(aside), 1)
		want("accepted past the total, still", len(late), 0)
		b1.Close()
		synctest.Wait()
		want("accepted when there is room", len(late), 1)
		(<-late).Close()
		a2.Close()
		a3.Close()
		synctest.Wait()
		want("slots", len(h.gate.slots), 1)
		want("sources", len(h.gate.sources), 0)
	})
}

// More than the aside of a source holds are turned away; who waits too long, too.
func TestGateAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(100, 1)
		from := sourceOf(origin(&line{from: "192.0.2.7:1"}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		enter := func() chan bool {
			in := make(chan bool, 1)
			if err := g.room(ctx); err != nil {
				t.Fatal(err)
			}
			go func() { in <- g.enter(ctx, from) }()
			synctest.Wait()
			return in
		}
		first := enter()
		var waiting []chan bool
		for range asideFactor {
			waiting = append(waiting, enter())
		}
		if !<-first || len(waiting[0]) != 0 {
			t.Fatal("the first did not enter, or the second did")
		}
		if <-enter() {
			t.Error("one more than may wait was let in")
		}
		g.leave(from)
		if !<-waiting[0] {
			t.Error("the first that waits did not get the place")
		}
		time.Sleep(time.Minute)
		for i, w := range waiting[1:] {
			if <-w {
				t.Errorf("waiter %d entered after its time", i)
			}
		}
		g.leave(from)
		if len(g.slots) != 0 || len(g.sources) != 0 {
			t.Errorf("%d slots, %d sources left", len(g.slots), len(g.sources))
		}
		if err := g.room(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("room: %v", err)
		}
	})
}

// Close sends what is queued; a write's error is not lost.
func TestWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		w := newWire(server, newBuffers(), nil)
		want := 3 * writeSize
		got := make(chan int)
		go func() { n, _ := io.Copy(io.Discard, client); got <- int(n) }()
		for range 3 {
			if n, err := w.Write(make([]byte, writeSize)); n != writeSize || err != nil {
				t.Fatalf("Write() = %d, %v", n, err)
			}
		}
		if err := w.Close(); err != nil {
			t.Errorf("Close() = %v, want nil", err)
		}
		if n := <-got; n != want {
			t.Errorf("%d bytes arrived, want %d", n, want)
		}
		if _, err := w.Write([]byte("x")); err == nil {
			t.Error("Write after Close: no error")
		}

		client, server = net.Pipe()
		w = newWire(server, newBuffers(), nil)
		w.Write([]byte("x")) // queued: the error comes later
		client.Close()
		synctest.Wait()
		if _, err := w.Write([]byte("y")); err == nil {
			t.Error("Write after a failed one: no error")
		}
		if err := w.Close(); err == nil {
			t.Error("Close after a failed write: no error")
		}

		_, server = net.Pipe() // nobody reads
		w = newWire(server, newBuffers(), nil)
		w.Write([]byte("x"))
		if took := after(func() { w.Close() }); took != flushLimit {
			t.Errorf("Close with a stuck client took %v, want %v", took, flushLimit)
		}
	})
}
