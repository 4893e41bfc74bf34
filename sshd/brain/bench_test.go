package brain

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// BenchmarkCycle is a submit, a lease and a finish, each durable before the next, by
// 256 clients and as many runners in one pool.
func BenchmarkCycle(b *testing.B) {
	st, err := store.OpenSQLite(context.Background(), b.TempDir(), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	br, err := New(context.Background(), Config{Store: st, Policy: queue.DefaultPolicy()})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go br.Run(ctx)
	defer func() { cancel(); <-br.ended }()
	const n = 256
	var clients, runners sync.WaitGroup
	links := make([]*Link, n)
	for i := range links {
		name := fmt.Sprint("runner", i)
		if links[i], err = br.Join(ctx, queue.Runner{ID: name, Name: name, Pools: []string{"p"}}, nil); err != nil {
			b.Fatal(err)
		}
		runners.Go(func() {
			for links[i].Beat(ctx, job.Beat{Idle: true}) == nil {
				call, ok := <-links[i].Calls()
				if !ok {
					return
				}
				br.Do(ctx, queue.Finish{Runner: name, Lease: call.Offer.Lease, Result: job.Result{Reason: job.ReasonExit, Begun: true}})
			}
		})
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	for i := range n {
		clients.Go(func() {
			for left.Add(-1) >= 0 {
				reply, err := br.Do(ctx, queue.Submit{Record: job.Record{Job: job.Job{User: fmt.Sprint("user", i), Pool: "p", Kind: "run"},
					Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}})
				if err != nil {
					b.Error(err)
					return
				}
				id := reply.(*job.Record).ID
				for bell := br.Bell(id); bell != nil; bell = br.Bell(id) {
					<-bell
				}
			}
		})
	}
	clients.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "cycles/s")
	for _, l := range links {
		l.Leave(ctx)
	}
	runners.Wait()
}

// BenchmarkLoad is a restart with a hundred thousand jobs waiting.
func BenchmarkLoad(b *testing.B) {
	dir := b.TempDir()
	st, err := store.OpenSQLite(context.Background(), dir, nil)
	if err != nil {
		b.Fatal(err)
	}
	br, err := New(context.Background(), Config{Store: st, Policy: queue.DefaultPolicy()})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go br.Run(ctx)
	var wg sync.WaitGroup
	for part := range 256 {
		wg.Go(func() {
			for i := part; i < 100_000; i += 256 {
				br.Do(ctx, queue.Submit{Record: job.Record{Job: job.Job{User: fmt.Sprint("user", i%1000), Pool: "p", Kind: "run"},
					Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}})
			}
		})
	}
	wg.Wait()
	cancel()
	<-br.ended
	st.Close()
	for b.Loop() {
		st, err := store.OpenSQLite(context.Background(), dir, nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := New(context.Background(), Config{Store: st, Policy: queue.DefaultPolicy()}); err != nil {
			b.Fatal(err)
		}
		st.Close()
	}
}
