package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
)

const bufSize = 256 << 10

// A source reads a stream in large pieces, copies each to tee, and hands it out in
// small ones. It can skip without copying, which archive/tar makes use of because a
// source is an io.Seeker, if only forwards.
type source struct {
	r     io.Reader
	tee   io.Writer // may be nil
	buf   []byte
	pos   int // of the next byte in buf
	end   int
	total int64 // bytes read from r
	max   int64 // a refusal beyond; 0 for none
	err   error // what ended the stream; io.EOF if it just ended
	zero  bool  // the last Read gave one whole block of zeros
}

func newSource(r io.Reader, tee io.Writer) *source {
	return &source{r: r, tee: tee, buf: make([]byte, bufSize)}
}

// failed returns the error that cut the stream short, or nil.
func (s *source) failed() error {
	if s.err == io.EOF {
		return nil
	}
	return s.err
}

// fill reads until buf is full, so that the tee is written in whole aligned pieces.
// io.ReadFull would not do: it hides whether the end was a clean one.
func (s *source) fill() error {
	s.pos, s.end = 0, 0
	for s.err == nil && s.end < len(s.buf) {
		var n int
		n, s.err = s.r.Read(s.buf[s.end:])
		s.end += n
	}
	s.total += int64(s.end)
	if s.tee != nil && s.end > 0 {
		if _, err := s.tee.Write(s.buf[:s.end]); err != nil {
			s.end, s.err = 0, fmt.Errorf("keep archive: %w", err)
		}
	}
	if s.max > 0 && s.total > s.max {
		s.end, s.err = 0, &RefusedError{Why: "unpacks to more than is allowed, in headers and padding alone", TooBig: true}
	}
	if s.end == 0 {
		return s.err
	}
	return nil
}

func (s *source) Read(p []byte) (int, error) {
	if s.pos == s.end {
		s.zero = s.zero && len(p) == blockSize // the end of the stream after a block keeps it
		if err := s.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.buf[s.pos:s.end])
	s.pos += n
	s.zero = n == blockSize && bytes.Equal(p[:n], zeroBlock[:])
	return n, nil
}

const blockSize = 512

var zeroBlock [blockSize]byte

var errSeek = errors.New("a stream only seeks forwards")

// Seek skips: offset must not be negative, nor whence anything but io.SeekCurrent.
func (s *source) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errSeek
	}
	for offset > 0 {
		if s.pos == s.end {
			if err := s.fill(); err != nil {
				if err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return 0, err
			}
		}
		n := int(min(offset, int64(s.end-s.pos)))
		s.pos, offset, s.zero = s.pos+n, offset-int64(n), false
	}
	return s.total - int64(s.end-s.pos), nil
}

// peek returns up to n bytes without taking them; fewer only at the end.
func (s *source) peek(n int) ([]byte, error) {
	if s.pos == s.end {
		if err := s.fill(); err != nil && err != io.EOF {
			return nil, err
		}
	}
	return s.buf[s.pos:min(s.end, s.pos+n)], nil
}

// drain reads the rest, which may be at most n bytes.
func (s *source) drain(n int64) error {
	start := s.total - int64(s.end-s.pos)
	for s.pos = s.end; ; s.pos = s.end {
		if s.total-start > n {
			return &RefusedError{Why: "too much follows the end of the tar", TooBig: true}
		}
		if err := s.fill(); err != nil {
			return s.failed()
		}
	}
}

const noLimit = math.MaxInt64
