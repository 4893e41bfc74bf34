package job

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A Kind says what a frame carries. One codec serves every hop: shim → runner,
// runner → raid and the spool on disk are the same bytes, so what was received
// can be appended as it is and resuming is one byte offset.
type Kind byte

const (
	// What a job says; these make up its log.
	Out  Kind = 'o' // bytes of stdout
	Err  Kind = 'e' // bytes of stderr
	Raid Kind = 'r' // a line of raid's own, without prefix and newline
	Mark Kind = 's' // a [Step] as JSON: it begins or has ended
	Gap  Kind = 'g' // 8 bytes, big endian: so many bytes of log were dropped here

	// What travels beside the log.
	File   Kind = 'f' // bytes of a tar: the source going in, /build coming out; an empty one ends it
	Final  Kind = 'z' // a [Result] as JSON, the last frame of an attempt
	Order  Kind = 'q' // a [Spec] with environment as JSON, the first frame into a box
	Stop   Kind = 'k' // into a box: end the steps now; the payload is a [Reason]
	Ready  Kind = 'y' // out of a box: the shim waits for its order
	Begun  Kind = 'b' // out of a box: the first step is about to start
	Sealed Kind = 'd' // runner → raid: the log is complete; file and result follow
	Grown  Kind = 'w' // local runner → raid, instead of the log: 8 bytes, big endian, where it ends now
)

// Logged reports whether frames of kind k belong in a job's log.
func (k Kind) Logged() bool {
	return k == Out || k == Err || k == Raid || k == Mark || k == Gap
}

const (
	// HeaderLen is the length of a frame's header: kind, then a big-endian uint32.
	HeaderLen = 5
	// MaxFrame bounds a payload, so that a hostile header costs no memory.
	MaxFrame = 1 << 20
)

// ErrFrame is returned for bytes that are no frame.
var ErrFrame = errors.New("malformed frame")

// PutHeader writes the header of a frame of n payload bytes to b[:HeaderLen].
func PutHeader(b []byte, k Kind, n int) {
	b[0] = byte(k)
	binary.BigEndian.PutUint32(b[1:], uint32(n))
}

// AppendFrame appends one whole frame to b.
func AppendFrame(b []byte, k Kind, payload []byte) []byte {
	var h [HeaderLen]byte
	PutHeader(h[:], k, len(payload))
	return append(append(b, h[:]...), payload...)
}

// WriteFrame writes one whole frame with a single Write.
func WriteFrame(w io.Writer, k Kind, payload []byte) error {
	_, err := w.Write(AppendFrame(make([]byte, 0, HeaderLen+len(payload)), k, payload))
	return err
}

// ParseHeader reads the header of a frame; the kind must be a known one and the
// length at most MaxFrame.
func ParseHeader(b []byte) (k Kind, n int, err error) {
	if len(b) < HeaderLen {
		return 0, 0, io.ErrUnexpectedEOF
	}
	k, n = Kind(b[0]), int(binary.BigEndian.Uint32(b[1:]))
	switch k {
	case Out, Err, Raid, Mark, Gap, File, Final, Order, Stop, Ready, Begun, Sealed, Grown:
	default:
		return 0, 0, fmt.Errorf("%w: kind %q", ErrFrame, byte(k))
	}
	if n > MaxFrame {
		return 0, 0, fmt.Errorf("%w: %d bytes", ErrFrame, n)
	}
	return k, n, nil
}

// A FrameReader reads frames from a stream of them. It is not safe for concurrent use.
type FrameReader struct {
	r   *bufio.Reader
	buf []byte
}

// NewFrameReader returns a reader of r with a buffer of 64 KiB.
func NewFrameReader(r io.Reader) *FrameReader {
	return &FrameReader{r: bufio.NewReaderSize(r, 64<<10)}
}

// Next returns the next frame. The payload is valid until the next call. At the
// clean end of the stream the error is io.EOF, inside a frame io.ErrUnexpectedEOF.
func (f *FrameReader) Next() (Kind, []byte, error) {
	h, err := f.r.Peek(HeaderLen)
	if err != nil {
		if err == io.EOF && len(h) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	k, n, err := ParseHeader(h)
	if err != nil {
		return 0, nil, err
	}
	f.r.Discard(HeaderLen)
	if n > cap(f.buf) {
		f.buf = make([]byte, n)
	}
	p := f.buf[:n]
	if _, err := io.ReadFull(f.r, p); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return k, p, nil
}
