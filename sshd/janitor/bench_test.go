package janitor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/stream"
)

// BenchmarkSweep looks through 100,000 finished jobs in SQLite, each with an upload of
// its own and a spool: what a sweep costs that has nothing to do. The first looks at
// all output, and is counted apart.
func BenchmarkSweep(b *testing.B) {
	const jobs = 100_000
	dir := b.TempDir()
	st, err := store.OpenSQLite(b.Context(), dir, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	blobs, err := blob.Open(filepath.Join(dir, "blobs"), blob.Options{})
	if err != nil {
		b.Fatal(err)
	}
	fillHistory(b, dir, st, jobs)
	br, err := brain.New(b.Context(), brain.Config{Store: st, Policy: queue.DefaultPolicy(), Logf: b.Logf})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(b.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); br.Run(ctx) }()
	defer func() { stop(); <-ended }()
	j := New(Config{Brain: br, Blobs: blobs, Spools: stream.New(filepath.Join(dir, "spool"), b.Logf), Files: 720 * time.Hour, Records: 8760 * time.Hour})
	start := time.Now()
	if _, err := j.sweep(ctx); err != nil {
		b.Fatal(err)
	}
	first := time.Since(start).Seconds()
	for b.Loop() {
		if r, err := j.sweep(ctx); err != nil || r.Jobs != jobs {
			b.Fatalf("sweep = %+v, %v", r, err)
		}
	}
	b.StopTimer()
	b.ReportMetric(first, "s-first") // Loop forgets what was reported before it
	j.Files = time.Minute
	start = time.Now()
	r, err := j.sweep(ctx)
	b.ReportMetric(time.Since(start).Seconds(), "s-to-expire-all")
	if err != nil || r.Expired != jobs {
		b.Fatalf("sweep = %+v, %v", r, err)
	}
	j.Records = time.Minute
	start = time.Now()
	r, err = j.sweep(ctx)
	b.ReportMetric(time.Since(start).Seconds(), "s-to-forget-all")
	if err != nil || r.Forgotten != jobs {
		b.Fatalf("sweep = %+v, %v", r, err)
	}
}

// fillHistory makes jobs as raid leaves them behind.
func fillHistory(b *testing.B, dir string, st store.Store, jobs int) {
	then := job.At(time.Now().Add(-2 * time.Hour))
	exit := 0
	var writes []queue.Write
	var rev store.Rev
	for id := int64(1); id <= int64(jobs); id++ {
		sum := sha256.Sum256(fmt.Append(nil, id))
		key := hex.EncodeToString(sum[:])
		rec := job.Record{Source: "sha256:" + key, Job: job.Job{ID: id, State: job.Succeeded, Reason: job.ReasonExit, Exit: &exit,
			User: fmt.Sprint("user", id%200), Team: fmt.Sprint("team", id%60), Pool: "rai_amd64", Kind: "run", SourceSHA256: key,
			QueuedAt: then, StartedAt: then, FinishedAt: then, Engine: "bwrap", Runner: "local-0", GPU: "NVIDIA A40", Attempt: 1},
			Spec: job.Spec{Image: "nvidia/cuda:12.4.1-devel-ubuntu22.04", Steps: []string{"cmake /src", "make -j4", "./a.out /data/x /data/y"}}}
		writes = append(writes, queue.PastRow(&rec))
		path := filepath.Join(dir, "blobs", "sha256", key[:2], key[2:])
		spool := filepath.Join(dir, "spool", fmt.Sprint(id), "1")
		if err := os.MkdirAll(spool, 0o700); err != nil {
			b.Fatal(err)
		}
		for _, file := range []string{path, filepath.Join(spool, "0000000000000000.seg"), filepath.Join(spool, "sealed"), filepath.Join(spool, "..", "done")} {
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.Chtimes(path, then.Time, then.Time); err != nil {
			b.Fatal(err)
		}
		if len(writes) < 5000 && id < int64(jobs) {
			continue
		}
		if id == int64(jobs) {
			writes = append(writes, queue.Write{Row: queue.Row{Table: queue.TableMeta, Key: "core", Value: fmt.Appendf(nil, `{"next":%d}`, id+1)}})
		}
		var err error
		if rev, err = st.Commit(b.Context(), rev, writes); err != nil {
			b.Fatal(err)
		}
		writes = nil
	}
}
