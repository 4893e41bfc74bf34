package job

import "io"

// A Splitter reads a stream of frames and parts what belongs in the log from what
// does not. Frames of the log come in runs, as many as have arrived, still encoded:
// they can be appended to a spool or sent on with one write. It is not safe for
// concurrent use.
type Splitter struct {
	r      io.Reader
	buf    []byte
	lo, hi int // the unread bytes
	ahead  int // of them, what the last call returned
}

// A Run is what Next returns: either Log is set, or Kind and Payload are.
type Run struct {
	Log     []byte // one or more whole frames, encoded
	Printed int64  // payload bytes of Out and Err in Log
	Kind    Kind
	Payload []byte
}

// splitterRoom is how much is read at once: large enough for few system calls,
// small enough to hold one for every attempt.
const splitterRoom = 256 << 10

// NewSplitter returns a splitter of r.
func NewSplitter(r io.Reader) *Splitter {
	return &Splitter{r: r, buf: make([]byte, splitterRoom)}
}

// Next returns the next run; its bytes are valid until the next call. It returns as
// soon as one frame is complete. The error is io.EOF at the clean end of the stream,
// io.ErrUnexpectedEOF inside a frame, or wraps ErrFrame.
func (s *Splitter) Next() (Run, error) {
	s.lo += s.ahead
	s.ahead = 0
	for {
		run, n, err := split(s.buf[s.lo:s.hi])
		if err != nil {
			return Run{}, err
		}
		if n > 0 {
			s.ahead = n
			return run, nil
		}
		if err := s.fill(); err != nil {
			return Run{}, err
		}
	}
}

// fill reads more, after making room for at least one whole frame.
func (s *Splitter) fill() error {
	if s.lo > 0 {
		copy(s.buf, s.buf[s.lo:s.hi])
		s.lo, s.hi = 0, s.hi-s.lo
	}
	if s.hi == len(s.buf) { // one frame larger than the room: MaxFrame bounds it
		s.buf = append(s.buf, make([]byte, HeaderLen+MaxFrame-len(s.buf))...)
	}
	n, err := s.r.Read(s.buf[s.hi:])
	s.hi += n
	if n > 0 {
		return nil
	}
	if err == io.EOF && s.hi > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// split finds the run at the start of b and its length, 0 when b is too short.
func split(b []byte) (run Run, n int, err error) {
	for len(b)-n >= HeaderLen {
		k, size, err := ParseHeader(b[n:])
		if err != nil && n == 0 {
			return Run{}, 0, err
		}
		if err != nil || len(b)-n < HeaderLen+size {
			break // what came before it goes first
		}
		if !k.Logged() {
			if n == 0 {
				return Run{Kind: k, Payload: b[HeaderLen : HeaderLen+size]}, HeaderLen + size, nil
			}
			break
		}
		if k == Out || k == Err {
			run.Printed += int64(size)
		}
		n += HeaderLen + size
	}
	run.Log = b[:n]
	return run, n, nil
}
