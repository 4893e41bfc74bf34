package door

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	readSize  = 256 << 10 // one read(2) of a bulk upload
	writeSize = 64 << 10  // one write(2) of a bulk download
	quickAcks = 64        // reads after which the client's Nagle no longer waits for our delayed ACK
)

// errEOF is how a connection ends whose other side went away without a word.
var errEOF = io.EOF

// A wire is a net.Conn that makes few system calls and keeps no buffer while nothing
// moves. golang.org/x/crypto/ssh alone reads and writes a 32 KiB packet in two calls
// each.
//
// Reads take what the kernel has, up to readSize, into a buffer that goes back as soon
// as it is drained. Before login the buffer is the caller's own 4 KiB. Writes are
// gathered while an earlier one is in the kernel: Write returns once the bytes are
// queued, at most 2 × writeSize of them, and reports the error of an earlier write.
// Close waits for what is queued, within limits. One goroutine may read, any number
// may write.
//
// Deadlines are ignored. gliderlabs sets them on each read and write, to values that
// wipe those of anybody else (defect j); who wants to end a wire uses abort.
type wire struct {
	net.Conn
	conn    *conn
	buffers *buffers
	raw     syscall.RawConn // nil where there is no descriptor to poll

	received atomic.Int64  // bytes; any is a sign of life
	trusted  atomic.Bool   // logged in: big buffers
	ended    atomic.Bool   // the end of the stream has been told to x/crypto
	calm     chan struct{} // a session has noticed its end
	closed   chan struct{} // closed by the first Close or abort
	flushers sync.WaitGroup

	// Of the reading goroutine.
	buf  *[readSize]byte
	rest []byte // not yet taken, in buf
	acks int
	take func(fd uintptr) bool // made once: it would escape on each read
	got  int
	fail error

	mu       sync.Mutex // protects the following
	moved    sync.Cond  // a write ended
	queue    []byte     // from buffers; nil when empty
	flushing bool
	shut     bool
	err      error // of the first write that failed, or of abort
}

// buffers are shared by all connections of a server.
type buffers struct{ read, write sync.Pool }

func newBuffers() *buffers {
	return &buffers{
		read:  sync.Pool{New: func() any { return new([readSize]byte) }},
		write: sync.Pool{New: func() any { return new([writeSize]byte) }},
	}
}

func newWire(nc net.Conn, b *buffers, c *conn) *wire {
	w := &wire{Conn: nc, conn: c, buffers: b, calm: make(chan struct{}, 1), closed: make(chan struct{})}
	w.moved.L = &w.mu
	w.raw = pollable(nc)
	w.take = w.readNow
	if tcp, ok := nc.(*net.TCPConn); ok {
		tcp.SetNoDelay(true)
	}
	return w
}

// trust lets the wire spend memory on speed.
func (w *wire) trust() { w.trusted.Store(true) }

// Read implements net.Conn.
func (w *wire) Read(p []byte) (int, error) {
	if len(w.rest) == 0 {
		n, err := w.fill(p)
		w.received.Add(int64(n))
		if w.acks < quickAcks {
			w.acks++
			quickAck(w.raw)
		}
		if err != nil && n == 0 {
			w.settle()
		}
		if w.buf == nil {
			return n, err
		}
	}
	n := copy(p, w.rest)
	if w.rest = w.rest[n:]; len(w.rest) == 0 {
		w.buffers.read.Put(w.buf)
		w.buf = nil
	}
	return n, nil
}

// fill waits for bytes. It puts them into p, or into w.buf when p is small and the
// client may use our memory.
func (w *wire) fill(p []byte) (int, error) {
	if w.raw == nil || !w.trusted.Load() || len(p) >= readSize {
		return w.Conn.Read(p)
	}
	w.got, w.fail = 0, nil
	if err := w.raw.Read(w.take); err != nil {
		return 0, err
	}
	return w.got, w.fail
}

// settle is called at the end of the stream, before anybody is told. A client that
// closes its channel and hangs up at once has left; one that only hangs up is lost.
// The difference is which of the two the sessions see first, and the close is still
// on its way through x/crypto's goroutines. So it gets a moment.
func (w *wire) settle() {
	const moment = 100 * time.Millisecond // on a busy machine too
	limit := time.NewTimer(moment)
	defer limit.Stop()
	for w.conn.unaware() {
		select {
		case <-w.calm:
		case <-w.closed:
			return
		case <-limit.C:
			w.ended.Store(true)
			return
		}
	}
	w.ended.Store(true)
}

// settled says that a session has seen its channel close.
func (w *wire) settled() {
	select {
	case w.calm <- struct{}{}:
	default:
	}
}

// Write implements net.Conn.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for n < len(p) {
		for w.err == nil && len(w.queue) == writeSize {
			w.moved.Wait()
		}
		if w.err != nil {
			return n, w.err
		}
		if w.shut {
			return n, net.ErrClosed
		}
		if w.queue == nil {
			w.queue = w.buffers.write.Get().(*[writeSize]byte)[:0]
		}
		k := min(writeSize-len(w.queue), len(p)-n)
		w.queue = append(w.queue, p[n:n+k]...)
		n += k
		if !w.flushing {
			w.flushing = true
			w.flushers.Go(w.flush)
		}
	}
	return n, nil
}

// flush writes the queue out and ends when it is empty.
func (w *wire) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 {
		out := w.queue
		w.queue = nil
		if w.err == nil {
			w.mu.Unlock()
			_, err := w.Conn.Write(out)
			w.mu.Lock()
			if err != nil && w.err == nil {
				w.err = err
			}
		}
		w.buffers.write.Put((*[writeSize]byte)(out[:writeSize]))
		w.moved.Broadcast()
	}
	w.flushing = false
	w.moved.Broadcast()
}

// Close sends what is queued, for at most flushLimit, and closes the connection. It
// returns the first error of any write. When the other side is known to be gone, one
// second is enough.
func (w *wire) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.shut {
		return w.err
	}
	w.shut = true
	limit := flushLimit
	if w.ended.Load() {
		limit = time.Second
	}
	stop := time.AfterFunc(limit, func() { w.Conn.Close() })
	for w.flushing && w.err == nil {
		w.moved.Wait()
	}
	stop.Stop()
	close(w.closed)
	w.Conn.Close()
	return w.err
}

// abort closes the connection at once; what is queued is lost. Writers get cause.
func (w *wire) abort(cause error) {
	w.mu.Lock()
	if w.err == nil {
		w.err = cause
	}
	if !w.shut {
		w.shut = true
		close(w.closed)
	}
	w.moved.Broadcast()
	w.mu.Unlock()
	w.Conn.Close()
}

// SetDeadline does nothing: see wire.
func (w *wire) SetDeadline(time.Time) error { return nil }

// SetReadDeadline does nothing: see wire.
func (w *wire) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline does nothing: see wire.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }
