package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rai-project/raid/runner/job"
)

func TestVerdict(t *testing.T) {
	ok, three := job.Step{}, job.Step{Exit: 3}
	segv := job.Step{Exit: 139, Signal: "SIGSEGV"}
	for _, tt := range []struct {
		steps  []job.Step
		reason job.Reason
		want   job.Result
	}{
		{[]job.Step{ok}, "", job.Result{Reason: job.ReasonExit}},
		{[]job.Step{ok, three, segv}, "", job.Result{Reason: job.ReasonExit, Exit: 3}},
		{[]job.Step{ok, segv, three}, "", job.Result{Reason: job.ReasonSignal, Exit: 139, Signal: "SIGSEGV"}},
		{[]job.Step{ok}, job.ReasonTimeout, job.Result{Reason: job.ReasonTimeout, Exit: 124}},
		{[]job.Step{segv}, job.ReasonCancelled, job.Result{Reason: job.ReasonCancelled, Exit: 130}},
	} {
		if got := verdict(tt.steps, tt.reason); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("verdict(%v, %q) = %+v, want %+v", tt.steps, tt.reason, got, tt.want)
		}
	}
}

func TestClip(t *testing.T) {
	for _, tt := range []struct {
		s    string
		n    int
		want string
	}{
		{"abc", 3, "abc"},
		{"abcd", 3, "abc…"},
		{"aéé", 2, "a…"},
		{"éé", 1, "…"},
	} {
		if got := clip(tt.s, tt.n); got != tt.want {
			t.Errorf("clip(%q, %d) = %q, want %q", tt.s, tt.n, got, tt.want)
		}
	}
}

func TestEncodeFitsOneFrame(t *testing.T) {
	r := job.Result{Reason: job.ReasonExit, Exit: 3, Steps: make([]job.Step, 5000)}
	for i := range r.Steps {
		r.Steps[i].Line = strings.Repeat("\x01", 4096) // six bytes each in JSON
	}
	b := encode(r)
	var got job.Result
	if err := json.Unmarshal(b, &got); err != nil || len(b) > job.MaxFrame || got.Exit != 3 || len(got.Steps) != maxSteps {
		t.Errorf("encode: %d bytes, %d steps, error %v", len(b), len(got.Steps), err)
	}
	if len(r.Steps[0].Line) != 4096 {
		t.Error("encode changed its argument")
	}
}

func TestJoin(t *testing.T) {
	for _, tt := range [][3]string{{"", "", ""}, {"a", "", "a"}, {"", "b", "b"}, {"a", "b", "a; b"}} {
		if got := join(tt[0], tt[1]); got != tt[2] {
			t.Errorf("join(%q, %q) = %q, want %q", tt[0], tt[1], got, tt[2])
		}
	}
}

func TestFileWriter(t *testing.T) {
	for _, n := range []int{0, 1, fileFrame - 1, fileFrame, fileFrame + 1, 3 * fileFrame} {
		var sent bytes.Buffer
		f := newFileWriter(&wire{w: &sent})
		want := bytes.Repeat([]byte("ab\n"), n/3+1)[:n]
		f.Write(want[:n/2])
		f.Write(want[n/2:])
		f.flush()
		var got []byte
		for r := job.NewFrameReader(&sent); ; {
			k, p, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil || k != job.File || len(p) == 0 || len(p) > fileFrame {
				t.Fatalf("%d bytes: frame of kind %q with %d bytes, error %v", n, byte(k), len(p), err)
			}
			got = append(got, p...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d others", n, len(got))
		}
	}
}

func TestLostWire(t *testing.T) {
	r, wr := io.Pipe()
	r.Close()
	var lost error
	w := &wire{w: wr, lost: func(err error) { lost = err }}
	w.send(job.Out, []byte("x"))
	if !errors.Is(lost, io.ErrClosedPipe) {
		t.Errorf("lost(%v), want %v", lost, io.ErrClosedPipe)
	}
}

// FuzzOrder feeds what a runner might send to the ear: it must neither panic nor hang,
// whatever becomes of the source meanwhile.
func FuzzOrder(f *testing.F) {
	order := job.AppendFrame(nil, job.Order, []byte(`{"spec":{"steps":["true"]},"source":true}`))
	f.Add([]byte{})
	f.Add(order)
	f.Add(job.AppendFrame(job.AppendFrame(order, job.File, []byte("tar")), job.File, nil))
	f.Add(job.AppendFrame(job.AppendFrame(order, job.Stop, []byte("timeout")), job.Stop, nil))
	f.Add(job.AppendFrame(job.AppendFrame(order, job.File, nil), job.Order, nil))
	f.Add([]byte("q\x00\x10\x00\x00{"))
	f.Fuzz(func(t *testing.T, in []byte) {
		source, sourceIn := io.Pipe()
		stops := 0
		e := &ear{frames: job.NewFrameReader(bytes.NewReader(in)), source: sourceIn, stop: func(job.Reason) { stops++ }}
		o, err := e.order()
		if err != nil {
			return
		}
		for _, line := range o.Spec.Steps {
			if !utf8.ValidString(line) {
				t.Errorf("line %q is not UTF-8, and a frame is to carry it as JSON", line)
			}
		}
		read := make(chan int64)
		go func() {
			n, _ := io.Copy(io.Discard, source)
			read <- n
		}()
		if err := e.listen(); err == nil {
			t.Error("listen ended without a reason")
		}
		if n := <-read; n > int64(len(in)) {
			t.Errorf("source of %d bytes from %d", n, len(in))
		}
		if stops*job.HeaderLen > len(in) {
			t.Errorf("%d stops from %d bytes", stops, len(in))
		}
	})
}
