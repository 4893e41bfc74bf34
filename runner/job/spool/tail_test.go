package spool

import (
	"bytes"
	"io"
	"testing"

	"github.com/rai-project/raid/runner/job"
)

// TestLastWordsStay: with a limit no larger than one frame, the newest output is
// still there at the end; a small frame after a large one must not push it out.
func TestLastWordsStay(t *testing.T) {
	l, err := Open(t.TempDir(), Options{Limit: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for i := range 20 {
		frame := bytes.Repeat([]byte{byte('a' + i)}, 64<<10)
		if err := l.Append(job.AppendFrame(nil, job.Out, frame)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Append(job.AppendFrame(nil, job.Mark, []byte(`{"n":1}`))); err != nil {
		t.Fatal(err)
	}
	if err := l.Seal(); err != nil {
		t.Fatal(err)
	}
	var out []byte
	for r := l.Reader(0); ; {
		c, err := r.Next(t.Context())
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if c.Kind == job.Out {
			out = append(out, c.Data...)
		}
	}
	if last := byte('a' + 19); !bytes.HasSuffix(out, bytes.Repeat([]byte{last}, 1000)) || out[0] != 'a' {
		t.Errorf("%d bytes are left, from %q to %q; want the first and the last frame", len(out), out[0], out[len(out)-1])
	}
}
