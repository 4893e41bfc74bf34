package job

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

// stream is a few frames of every sort, and what they are.
func stream() []byte {
	var b []byte
	b = AppendFrame(b, Ready, nil)
	b = AppendFrame(b, Begun, nil)
	b = AppendFrame(b, Mark, []byte(`{"n":1}`))
	b = AppendFrame(b, Out, []byte("hello\n"))
	b = AppendFrame(b, Err, bytes.Repeat([]byte("x"), 300<<10))
	b = AppendFrame(b, File, []byte("tar"))
	b = AppendFrame(b, File, nil)
	return AppendFrame(b, Final, []byte(`{}`))
}

// TestSplitter holds that a splitter loses, adds and reorders nothing, however the
// bytes arrive.
func TestSplitter(t *testing.T) {
	want := stream()
	for name, r := range map[string]io.Reader{
		"at once":       bytes.NewReader(want),
		"byte by byte":  iotest.OneByteReader(bytes.NewReader(want)),
		"halves":        iotest.HalfReader(bytes.NewReader(want)),
		"data with EOF": iotest.DataErrReader(bytes.NewReader(want)),
	} {
		t.Run(name, func(t *testing.T) {
			var got []byte
			var printed int64
			for s := NewSplitter(r); ; {
				run, err := s.Next()
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatalf("Next() = %v", err)
				}
				if run.Log != nil {
					got = append(got, run.Log...)
					printed += run.Printed
				} else {
					got = AppendFrame(got, run.Kind, run.Payload)
				}
			}
			if !bytes.Equal(got, want) {
				t.Errorf("got %d bytes back, want the same %d", len(got), len(want))
			}
			if want := int64(6 + 300<<10); printed != want {
				t.Errorf("Printed = %d, want %d", printed, want)
			}
		})
	}
}

func TestSplitterErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   []byte
		want error
	}{
		{"empty", nil, io.EOF},
		{"half a header", []byte{'o', 0, 0}, io.ErrUnexpectedEOF},
		{"half a payload", []byte{'o', 0, 0, 0, 9, 'x'}, io.ErrUnexpectedEOF},
		{"unknown kind", []byte{0, 0, 0, 0, 0}, ErrFrame},
		{"too long", []byte{'o', 0xff, 0xff, 0xff, 0xff}, ErrFrame},
	} {
		if _, err := NewSplitter(bytes.NewReader(tt.in)).Next(); !errors.Is(err, tt.want) {
			t.Errorf("%s: Splitter.Next() = %v, want %v", tt.name, err, tt.want)
		}
		if _, _, err := NewFrameReader(bytes.NewReader(tt.in)).Next(); !errors.Is(err, tt.want) {
			t.Errorf("%s: FrameReader.Next() = %v, want %v", tt.name, err, tt.want)
		}
	}
}

// FuzzFrames: two independent readers of the same bytes see the same frames.
func FuzzFrames(f *testing.F) {
	f.Add(stream())
	f.Add([]byte{'o', 0, 0, 0, 1, 'x', 'q'})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, errA := readAll(NewFrameReader(bytes.NewReader(b)))
		c, errC := splitAll(NewSplitter(bytes.NewReader(b)))
		if !bytes.Equal(a, c) {
			t.Fatalf("frames differ: %q and %q", a, c)
		}
		if (errA == io.EOF) != (errC == io.EOF) {
			t.Fatalf("ends differ: %v and %v", errA, errC)
		}
		if !bytes.HasPrefix(b, a) {
			t.Fatalf("%q is no prefix of the input", a)
		}
	})
}

func readAll(r *FrameReader) (all []byte, err error) {
	for {
		k, p, err := r.Next()
		if err != nil {
			return all, err
		}
		all = AppendFrame(all, k, p)
	}
}

func splitAll(s *Splitter) (all []byte, err error) {
	for {
		run, err := s.Next()
		if err != nil {
			return all, err
		}
		if run.Log != nil {
			all = append(all, run.Log...)
		} else {
			all = AppendFrame(all, run.Kind, run.Payload)
		}
	}
}
