package sim

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/rai-project/raid/sshd/queue"
)

// TestFairInGPUSeconds: users with jobs of very different lengths get the same GPU
// time, where the orders of other job queues give one sixty times what another gets.
func TestFairInGPUSeconds(t *testing.T) {
	var lags []float64
	for seed := range uint64(3) {
		w := Backlogged(seed)
		w.Until = 30_000_000
		o := Run(w, "raid")
		if o.Jain < 0.999 || o.Used < 0.999 {
			t.Errorf("seed %d: Jain %.4f, %.3f of the GPUs used; want 0.999 of both", seed, o.Jain, o.Used)
		}
		lags = append(lags, o.WorstLag)
		if rr := Run(w, "round-robin"); rr.Jain > 0.6 {
			t.Errorf("seed %d: round robin has Jain %.3f: the workload proves nothing", seed, rr.Jain)
		}
	}
	if slices.Sort(lags); lags[len(lags)/2] > 1000 {
		t.Errorf("worst lags %.0f GPU-s; the middle one must be at most 1000", lags)
	}
}

// TestLightUsersAreServed: on deadline night somebody with a short job waits for a
// slot to come free, not for the hogs' queue.
func TestLightUsersAreServed(t *testing.T) {
	for seed := range uint64(2) {
		w := DeadlineNight(seed)
		ours, fifo := Run(w, "raid"), Run(w, "fifo")
		if ours.P95 > 600 {
			t.Errorf("seed %d: light users wait %.0f s at p95, longer than one running job of 600 s", seed, ours.P95)
		}
		if ours.Used < 0.99 {
			t.Errorf("seed %d: only %.3f of the GPUs used while jobs wait", seed, ours.Used)
		}
		if len(fifo.Waits) > 0 && fifo.P50 < ours.P50 {
			t.Errorf("seed %d: first come first served is better: the workload proves nothing", seed)
		}
	}
}

// TestNoBanking: whoever was away for hours and comes back with many jobs gets their
// share, not what they did not use.
func TestNoBanking(t *testing.T) {
	w := Workload{GPUs: 4, Limit: 600_000, Until: 36_000_000}
	for i := range 4000 {
		w.Jobs = append(w.Jobs, Job{At: 0, User: "steady", Team: "steady", Length: 60_000})
		if i < 2000 {
			w.Jobs = append(w.Jobs, Job{At: 18_000_000, User: "back", Team: "back", Length: 60_000})
		}
	}
	o := Run(w.sorted(), "raid")
	got := map[string]float64{}
	for _, s := range o.Shares {
		got[s.Name] = s.Got
	}
	fair := 18_000.0 * 4 / 2 // half of the second half
	if d := got["back"] - fair; d < -300 || d > 300 {
		t.Errorf("the one who was away got %.0f GPU-s, a fair share is %.0f", got["back"], fair)
	}
}

// TestBound asserts the theorem: however lengths are chosen, no two tenants that both
// always have jobs waiting drift apart by more than a bound that does not depend on
// time or on the number of jobs: 3(ρu+ρv) + ρmax + B(1/wu+1/wv), with ρ = min(M, cap)·L/w.
func TestBound(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := Workload{GPUs: rapid.IntRange(1, 4).Draw(rt, "gpus"), Limit: 300_000, Until: 1_500_000}
		tenants := rapid.IntRange(2, 4).Draw(rt, "tenants")
		for i := range tenants {
			name := fmt.Sprintf("t%d", i)
			mean := rapid.Int64Range(10_000, 300_000).Draw(rt, "mean")
			bait := rapid.IntRange(0, 20).Draw(rt, "bait") // short ones first, to fool the estimate
			for n, total := 0, queue.Millis(0); total < w.Until*queue.Millis(w.GPUs); n++ {
				length := mean
				if n < bait {
					length = 1000
				}
				w.Jobs = append(w.Jobs, Job{User: name, Team: name, Length: length})
				total += length
			}
		}
		o := Run(w, "raid")
		rho := float64(w.GPUs) * float64(w.Limit) / 1000
		bound := 3*(rho+rho) + rho + 2*float64(queue.DefaultPolicy().Burst)/1000
		if o.WorstLag > bound {
			rt.Fatalf("worst lag %.0f GPU-s, the bound is %.0f", o.WorstLag, bound)
		}
		if o.Used < 0.999 {
			rt.Fatalf("%.4f of the GPUs used while everybody waits", o.Used)
		}
	})
}

// TestReport: the table names every order, and the picture is well-formed.
func TestReport(t *testing.T) {
	r := Report{Workloads: []Workload{Backlogged(1), DeadlineNight(1)}}
	for i := range r.Workloads {
		r.Workloads[i].Jobs = r.Workloads[i].Jobs[len(r.Workloads[i].Jobs)-400:]
		var row []Outcome
		for _, o := range Orders() {
			row = append(row, Run(r.Workloads[i], o))
		}
		r.Outcomes = append(r.Outcomes, row)
	}
	var table, picture bytes.Buffer
	if err := r.Print(&table); err != nil {
		t.Fatal(err)
	}
	if err := r.Draw(&picture); err != nil {
		t.Fatal(err)
	}
	for _, o := range Orders() {
		if !strings.Contains(table.String(), o) {
			t.Errorf("the table lacks %s", o)
		}
	}
	for d := xml.NewDecoder(&picture); ; {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the picture is no XML: %v", err)
		}
	}
}

// BenchmarkDecisions is what one decision costs with ten thousand tenants and a
// million waiting jobs: claim and end of one job.
func BenchmarkDecisions(b *testing.B) {
	w := Workload{GPUs: 8, Limit: 3600_000}
	f := newFair(w)
	for i := range 1_000_000 {
		name := fmt.Sprintf("t%d", i%10_000)
		f.submit(0, i, Job{User: name, Team: name, Length: 60_000})
	}
	now := queue.Millis(0)
	running := f.next(now, 8)
	b.ResetTimer()
	begun := time.Now()
	for range b.N {
		now += 1000
		f.finish(now, running[0])
		running = append(running[1:], f.next(now, 1)...)
	}
	b.ReportMetric(float64(time.Since(begun).Nanoseconds())/float64(2*b.N), "ns/decision")
}
