package docker_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/job"
)

// BenchmarkBox prints what a box costs, beside docker run of the same image: until its
// shim is ready, from the order to the first byte of output, from there to the end,
// and to remove it. Medians, for a busy machine has a long tail.
func BenchmarkBox(b *testing.B) {
	e := newEngine(b, boxtest.ID(), nil)
	defer e.Close()
	took := map[string][]time.Duration{}
	limits := job.Limits{Memory: 1 << 30, CPUs: 2, Pids: 4096, Disk: 10 << 30}
	for i := range b.N {
		at := time.Now()
		lap := func(name string) { took[name] = append(took[name], time.Since(at)); at = time.Now() }
		x, err := e.Start(b.Context(), box.Config{ID: fmt.Sprintf("b%d", i), Limits: limits})
		if err != nil {
			b.Fatal(err)
		}
		frames := job.NewFrameReader(x.Stdout())
		await(b, frames, job.Ready)
		lap("ready")
		order, err := json.Marshal(job.BoxOrder{Spec: job.Spec{Steps: []string{"echo x"}}})
		if err != nil {
			b.Fatal(err)
		}
		if err := job.WriteFrame(x.Stdin(), job.Order, order); err != nil {
			b.Fatal(err)
		}
		await(b, frames, job.Out)
		lap("first-byte")
		await(b, frames, job.Final)
		lap("final")
		if _, _, err := frames.Next(); err != io.EOF {
			b.Fatal(err)
		}
		lap("eof")
		x.Wait()
		lap("wait")
		if err := x.Close(); err != nil {
			b.Fatal(err)
		}
		lap("close")
		if out, err := exec.Command("docker", "run", "--rm", "--network", "none", "--entrypoint", "echo", os.Getenv(envImage), "x").CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		lap("docker-run")
	}
	for name, ds := range took {
		slices.Sort(ds)
		b.ReportMetric(ds[len(ds)/2].Seconds()*1000, "ms-"+name)
	}
	b.ReportMetric(0, "ns/op")
}

func await(b *testing.B, frames *job.FrameReader, want job.Kind) {
	b.Helper()
	for {
		k, _, err := frames.Next()
		if err != nil {
			b.Fatal(err)
		}
		if k == want {
			return
		}
	}
}
