package queue

import (
	"fmt"
	"runtime"
	"testing"
)

// BenchmarkDecision is what one decision costs with ten thousand tenants and a million
// waiting jobs: a job starts, another ends. Encoding rows is the commit's part.
func BenchmarkDecision(b *testing.B) {
	const tenants, jobs, runners = 10_000, 1_000_000, 64
	w := newWorld(b)
	for i := range jobs {
		w.submit(fmt.Sprint("u", i%(2*tenants)), fmt.Sprint("t", i%tenants))
		w.forget()
	}
	running := make(chan Offer, runners)
	for i := range runners {
		w.join(fmt.Sprint("r", i))
		running <- w.offer()
	}
	w.forget()
	runtime.GC() // what submitting left behind is not a decision's
	do := func(cmd Command) {
		if _, err := w.c.Apply(w.now, cmd); err != nil {
			b.Fatal(err)
		}
	}
	runs := 0
	for b.Loop() {
		o := <-running
		w.now += 1000
		do(Finish{Runner: o.Runner, Lease: o.Lease, Result: passed})
		do(Beat{Runner: o.Runner, Idle: true})
		running <- w.c.Effects().Offers[0]
		if runs++; runs%256 == 0 {
			w.forget() // as often as a commit would
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(2*b.N), "ns/decision")
}

// BenchmarkOutlook is what it costs to say where everybody stands who waits.
func BenchmarkOutlook(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := newWorld(b)
			for i := range n {
				w.submit(fmt.Sprint("u", i%200), fmt.Sprint("t", i%60))
			}
			for i := range 30 {
				w.do(Join{Runner: Runner{ID: fmt.Sprint("r", i), Name: "r", Pools: []string{"p"}}})
			}
			for b.Loop() {
				w.c.Outlook(w.now, "p")
			}
		})
	}
}

// forget is Flush and Effects without the work.
func (w *world) forget() {
	w.c.wrote()
	w.c.out = Effects{}
}
