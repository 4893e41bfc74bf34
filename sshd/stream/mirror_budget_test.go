package stream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// All streams together stay within their bound: a job that finds no room is not mirrored,
// which is said once, but at its end if there is room then.
func TestMirrorBudget(t *testing.T) {
	const perJob = 64 << 10
	r := startRedis(t)
	s := spools(t, t.TempDir())
	o := MirrorOptions{URL: r.url(), PerJob: perJob}
	o.Memory = 7 * (&Mirror{MirrorOptions: o}).most() / 2
	m, d, stop := runMirror(t, s, o)
	begin := func(id int64) {
		m.Watch(id)
		say(t, attemptOf(t, s, id, 1), job.Out, "hello")
	}
	end := func(id int64) {
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(t, s, id)
	}
	for id := int64(1); id <= 3; id++ {
		begin(id)
		awaitEntry(t, r, id)
	}
	begin(4)
	if lines := d.await(t, 1); !strings.Contains(lines[0], "no room for more jobs") {
		t.Errorf("said %q", lines)
	}
	begin(5)
	end(5) // no room at its end either
	awaitStats(t, m, func(st MirrorStats) bool { return st.Refused == 2 && st.Streams == 3 })
	end(1) // and now there is
	r.last(1)
	begin(6)
	awaitEntry(t, r, 6)
	end(2)
	r.last(2)
	end(4)
	if got := brief(r.last(4)); len(got) != 2 || got[0] != "10-0 out hello" {
		t.Errorf("the stream of a job that found room at its end is %q", got)
	}
	if n := r.db.Exists(t.Context(), "rai:log:5").Val(); n != 0 {
		t.Error("a job was mirrored that had no room")
	}
	st := m.Stats()
	if st.Memory > st.Limit || st.Limit != o.Memory || st.Refused != 2 {
		t.Errorf("Stats = %+v", st)
	}
	if lines := d.await(t, 1); len(lines) != 1 {
		t.Errorf("said %q, want it once", lines)
	}
	stop()
	again, _, _ := runMirror(t, s, o) // it counts what is there
	awaitStats(t, again, func(st MirrorStats) bool { return st.Up })
	if st := again.Stats(); st.Memory < 5<<10 || st.Memory > o.Memory {
		t.Errorf("after a restart Stats = %+v, want the streams of 5 jobs in Memory", st)
	}
}

// awaitStats waits until they are so.
func awaitStats(t *testing.T, m *Mirror, until func(MirrorStats) bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 4000 {
		if until(m.Stats()) {
			return
		}
		<-tick.C
	}
	t.Fatalf("Stats = %+v", m.Stats())
}

// The bound is a quarter of maxmemory, if that is less.
func TestMirrorQuarter(t *testing.T) {
	r := startRedis(t, "--maxmemory", "40mb")
	m, _, _ := runMirror(t, spools(t, t.TempDir()), MirrorOptions{URL: r.url(), Memory: 1 << 30})
	awaitStats(t, m, func(st MirrorStats) bool { return st.Up })
	if st := m.Stats(); st.Limit != 10<<20 {
		t.Errorf("the limit is %d, want 10 MiB", st.Limit)
	}
}

// A stream takes no more than its stake, whatever the entries are.
func TestMirrorCost(t *testing.T) {
	const perJob = 128 << 10
	r := startRedis(t)
	s := spools(t, t.TempDir())
	m, _, _ := runMirror(t, s, MirrorOptions{URL: r.url(), PerJob: perJob})
	for id, size := range map[int64]int{1: 1, 2: 100, 3: 32 << 10} {
		l, err := s.Attempt(id, 1, 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		var frames []byte
		for i := 0; len(frames) < 4*perJob; i++ { // each an entry of its own
			frames = job.AppendFrame(frames, []job.Kind{job.Out, job.Err}[i%2], make([]byte, size))
		}
		if err := l.Append(frames); err != nil {
			t.Fatal(err)
		}
		m.Event(job.Job{ID: id, State: job.Succeeded})
		finish(t, s, id)
		r.end(id, 0)
		key := fmt.Sprint(logKey, id)
		took := r.db.MemoryUsage(t.Context(), key, 0).Val()
		m.mu.Lock()
		stake := m.stakes[id].bytes
		m.mu.Unlock()
		t.Logf("entries of %d bytes: %d of them take %d bytes, the stake is %d", size, r.db.XLen(t.Context(), key).Val(), took, stake)
		if took > m.most() || took > stake*5/4 {
			t.Errorf("entries of %d bytes take %d bytes of at most %d; the stake is %d", size, took, m.most(), stake)
		}
	}
}

// Every way to a Redis that contrib/docs/mirror.md names.
func TestMirrorURLs(t *testing.T) {
	for name, start := range map[string]func(*testing.T) (r *server, url string){
		"ACL": func(t *testing.T) (*server, string) {
			r := startRedis(t, strings.Fields("--user raid on >p%w "+mirrorACL)...)
			return r, "redis://raid:p%25w@" + r.addr + "/0"
		},
		"unix": func(t *testing.T) (*server, string) {
			path := filepath.Join(t.TempDir(), "s")
			return startRedis(t, "--unixsocket", path), "unix://" + path + "?db=0"
		},
		"TLS": func(t *testing.T) (*server, string) {
			cert, key := certificate(t)
			port := redistest.Port(t, "127.0.0.1")
			r := startRedis(t, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "no")
			return r, "rediss://127.0.0.1:" + port + "?ca=" + cert
		},
		"sentinel": func(t *testing.T) (*server, string) {
			r := startRedis(t)
			return r, "redis://" + startSentinel(t, r.addr) + "?master=mine"
		},
		"cluster": func(t *testing.T) (*server, string) {
			r := startRedis(t, "--cluster-enabled", "yes")
			ask(t, r, "cluster", "addslotsrange", 0, 16383)
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for range 1000 {
				if strings.Contains(r.db.ClusterInfo(t.Context()).Val(), "cluster_state:ok") {
					break
				}
				<-tick.C
			}
			return r, "redis://" + r.addr + "?cluster=true"
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, url := start(t)
			s := spools(t, t.TempDir())
			m, d, _ := runMirror(t, s, MirrorOptions{URL: url, PerJob: 64 << 10})
			for id := int64(1); id <= 3; id++ { // in several slots of a cluster
				m.Watch(id)
				say(t, attemptOf(t, s, id, 1), job.Out, strings.Repeat("0123456789", 20_000))
				m.Event(job.Job{ID: id, State: job.Succeeded})
				finish(t, s, id)
				r.end(id, 0)
			}
			awaitStats(t, m, func(st MirrorStats) bool { return st.Events == 3 })
			if n := r.db.XLen(t.Context(), eventsKey).Val(); n != 3 {
				t.Errorf("%d events", n)
			}
			if lines := d.await(t, 0); len(lines) > 0 {
				t.Errorf("said %q", lines)
			}
			f, err := ExamineRedis(t.Context(), url)
			if err != nil || f.Version == "" || f.Used == 0 {
				t.Errorf("ExamineRedis = %+v, %v", f, err)
			}
		})
	}
}

// certificate writes one that nobody signed.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, b []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert", "CERTIFICATE", der), write("key", "PRIVATE KEY", private)
}

// startSentinel starts one that watches a master named mine.
func startSentinel(t *testing.T, master string) string {
	t.Helper()
	host, port, _ := net.SplitHostPort(master)
	conf, own := filepath.Join(t.TempDir(), "sentinel.conf"), redistest.Port(t, "127.0.0.1")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "bind 127.0.0.1\nport %s\nsentinel monitor mine %s %s 1\n", own, host, port), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("redis-server", conf, "--sentinel")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	c := redis.NewSentinelClient(&redis.Options{Addr: "127.0.0.1:" + own, DisableIdentity: true})
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for c.GetMasterAddrByName(ctx, "mine").Err() != nil && ctx.Err() == nil {
		<-tick.C
	}
	return "127.0.0.1:" + own
}
