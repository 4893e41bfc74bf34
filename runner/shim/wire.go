package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/rai-project/raid/runner/job"
)

// A wire sends frames, each whole, from any goroutine. A slow runner blocks it; a
// runner that is gone ends the shim through lost, so that no caller sees an error.
type wire struct {
	mu   sync.Mutex
	w    io.Writer
	lost func(error) // does not return
}

// send sends one frame.
func (w *wire) send(k job.Kind, payload []byte) {
	w.put(k, append(make([]byte, job.HeaderLen, job.HeaderLen+len(payload)), payload...))
}

// put sends b[job.HeaderLen:] as one frame and writes the header into the gap in
// front, so that bulk data is not copied again.
func (w *wire) put(k job.Kind, b []byte) {
	job.PutHeader(b, k, len(b)-job.HeaderLen)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.w.Write(b); err != nil {
		w.lost(fmt.Errorf("send to the runner: %w", err))
	}
}

// fileFrame is the payload of a full File frame.
const fileFrame = 256 << 10

// A fileWriter cuts a tar into File frames.
type fileWriter struct {
	wire *wire
	buf  []byte
}

func newFileWriter(w *wire) *fileWriter {
	return &fileWriter{w, make([]byte, job.HeaderLen, job.HeaderLen+fileFrame)}
}

// Write never fails.
func (f *fileWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), cap(f.buf)-len(f.buf))
		f.buf, rest = append(f.buf, rest[:n]...), rest[n:]
		if len(f.buf) == cap(f.buf) {
			f.flush()
		}
	}
	return len(p), nil
}

// flush sends what is buffered; an empty frame would end the tar, so none is sent.
func (f *fileWriter) flush() {
	if len(f.buf) > job.HeaderLen {
		f.wire.put(job.File, f.buf)
		f.buf = f.buf[:job.HeaderLen]
	}
}

// errStopped is why the source ended early.
var errStopped = errors.New("stopped")

// An ear listens to the runner. Its source is closed when the tar is complete.
type ear struct {
	frames *job.FrameReader
	source *io.PipeWriter
	stop   func(job.Reason)
}

// order waits for the order.
func (e *ear) order() (job.BoxOrder, error) {
	var o job.BoxOrder
	k, p, err := e.frames.Next()
	if err != nil {
		return o, fmt.Errorf("wait for the order: %w", err)
	}
	if k != job.Order {
		return o, fmt.Errorf("%w: kind %q before the order", job.ErrFrame, byte(k))
	}
	if err := json.Unmarshal(p, &o); err != nil {
		return o, fmt.Errorf("read the order: %w", err)
	}
	return o, nil
}

// listen hands on what comes after the order, until the runner is gone or talks
// nonsense, and says which. It never waits for anything but the unpacking.
func (e *ear) listen() error {
	for {
		k, p, err := e.frames.Next()
		if err != nil {
			e.source.CloseWithError(io.ErrUnexpectedEOF)
			return fmt.Errorf("listen to the runner: %w", err)
		}
		switch {
		case k == job.File && len(p) == 0:
			e.source.Close()
		case k == job.File:
			e.source.Write(p) // after a failed unpack nobody reads on, and the rest is of no use
		case k == job.Stop:
			e.stop(job.Reason(p)) // first, or the source would end for no reason that is known
			e.source.CloseWithError(errStopped)
		default:
			err := fmt.Errorf("%w: kind %q after the order", job.ErrFrame, byte(k))
			e.source.CloseWithError(err)
			return err
		}
	}
}
