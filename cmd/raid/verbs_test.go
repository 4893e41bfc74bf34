package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/rai-project/raid/runner/box/docker/dockertest"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// cmdMktar writes a tar as no tar(1) would:
//
//	NAME=TEXT   a file       NAME->TO  a symbolic link      NAME=>TO  a hard link
//	NAME/       a folder     NAME|     a FIFO               NAME!     a device
//	cut         the last entry's content and the end are missing
func (w *world) cmdMktar(ts *testscript.TestScript, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: mktar FILE ENTRY…")
	}
	var buf bytes.Buffer
	t := tar.NewWriter(&buf)
	entries, short := args[1:], false
	if entries[len(entries)-1] == "cut" {
		entries, short = entries[:len(entries)-1], true
	}
	for _, e := range entries {
		h, content := entryOf(e)
		ts.Check(t.WriteHeader(&h))
		_, err := io.WriteString(t, content)
		ts.Check(err)
	}
	ts.Check(t.Close())
	text := buf.Bytes()
	if short {
		text = text[:len(text)-2*512-512+1] // one byte of the last block
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), text, 0o644))
}

func entryOf(e string) (tar.Header, string) {
	h := tar.Header{Format: tar.FormatPAX, ModTime: time.Unix(1_600_000_000, 0), Mode: 0o755}
	if name, to, ok := strings.Cut(e, "->"); ok {
		h.Typeflag, h.Name, h.Linkname = tar.TypeSymlink, name, to
		return h, ""
	}
	if name, to, ok := strings.Cut(e, "=>"); ok {
		h.Typeflag, h.Name, h.Linkname = tar.TypeLink, name, to
		return h, ""
	}
	if name, text, ok := strings.Cut(e, "="); ok {
		h.Typeflag, h.Name, h.Size = tar.TypeReg, name, int64(len(text))
		return h, text
	}
	switch e[len(e)-1] {
	case '|':
		h.Typeflag, h.Name = tar.TypeFifo, e[:len(e)-1]
	case '!':
		h.Typeflag, h.Name, h.Devmajor, h.Devminor = tar.TypeChar, e[:len(e)-1], 1, 3
	default:
		h.Typeflag, h.Name = tar.TypeDir, e
	}
	return h, ""
}

// jobNames are the names of the job object, all of which are always there.
var jobNames = [...]string{"id", "state", "reason", "exit", "signal", "user", "team", "pool", "kind", "name", "engine",
	"image", "image_digest", "runner", "gpu", "attempt", "queued_at", "started_at", "finished_at", "queue_wait_ms", "prepare_ms",
	"run_ms", "collect_ms", "charged_s", "out_bytes", "source_sha256"}

// cmdEvents reads the lines of --json. The kinds that were asked for have to be there,
// in the order of their first lines; what the job printed is left in events.out and
// events.err.
func (w *world) cmdEvents(ts *testscript.TestScript, args []string) {
	var kinds []string
	var out, errs []byte
	for line := range strings.Lines(ts.ReadFile(args[0])) {
		var e struct {
			Event, T, Data string
			Job            int64
			B64            []byte
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			ts.Fatalf("not an event: %v: %s", err, line)
		}
		if _, err := time.Parse("2006-01-02T15:04:05.000Z", e.T); err != nil || e.Job == 0 {
			ts.Fatalf("without t or job: %s", line)
		}
		if !slices.Contains(kinds, e.Event) && e.Event != "position" { // a matter of luck
			kinds = append(kinds, e.Event)
		}
		data := append([]byte(e.Data), e.B64...)
		switch e.Event {
		case "out":
			out = append(out, data...)
		case "err":
			errs = append(errs, data...)
		case "done":
			checkJobObject(ts, line)
		}
	}
	if want := args[1:]; !slices.Equal(kinds, want) {
		ts.Fatalf("the events are %q, want %q", kinds, want)
	}
	ts.Check(os.WriteFile(ts.MkAbs("events.out"), out, 0o644))
	ts.Check(os.WriteFile(ts.MkAbs("events.err"), errs, 0o644))
}

// checkJobObject wants all of its names in a line that has three of its own.
func checkJobObject(ts *testscript.TestScript, line string) {
	var o map[string]any
	ts.Check(json.Unmarshal([]byte(line), &o))
	for _, name := range jobNames {
		if _, ok := o[name]; !ok {
			ts.Fatalf("the job object has no %s: %v", name, o)
		}
	}
	if len(o) != len(jobNames)+len([]string{"event", "job", "t"}) {
		ts.Fatalf("done has %d names: %v", len(o), o)
	}
}

// cmdSame compares hashes, for files too large for a diff.
func (w *world) cmdSame(ts *testscript.TestScript, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: same FILE FILE…")
	}
	want := sha256.Sum256([]byte(ts.ReadFile(args[0])))
	for _, name := range args[1:] {
		text := ts.ReadFile(name)
		if got := sha256.Sum256([]byte(text)); got != want {
			ts.Fatalf("%s (%d bytes) is not %s (%d bytes)", name, len(text), args[0], len(ts.ReadFile(args[0])))
		}
	}
}

// A proxy carries connections to raid until it is told to fall silent: it then passes
// nothing on, as a network cable that was pulled. Once mended it goes on where it was:
// what was on its way arrives, late.
type proxy struct {
	port     string
	far      string       // the other side's host
	to       atomic.Value // string: its port
	listener net.Listener
	closed   chan struct{}
	wg       sync.WaitGroup
	mu       sync.Mutex // protects the following
	conns    []net.Conn
	passes   chan struct{} // closed while it is whole
}

func (w *world) cmdProxy(ts *testscript.TestScript, args []string) {
	p, err := newProxy("127.0.0.1", "127.0.0.1", w.port)
	ts.Check(err)
	w.proxies[args[0]] = p
}

// newProxy makes a proxy that listens at host and passes on to a port of another.
func newProxy(host, far, port string) (*proxy, error) {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		return nil, err
	}
	p := &proxy{far: far, listener: l, closed: make(chan struct{}), passes: make(chan struct{})}
	close(p.passes)
	p.to.Store(port)
	if _, p.port, err = net.SplitHostPort(l.Addr().String()); err != nil {
		return nil, err
	}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	})
	return p, nil
}

// whole waits until the proxy passes things on, and reports whether it ever will.
func (p *proxy) whole() bool {
	p.mu.Lock()
	passes := p.passes
	p.mu.Unlock()
	select {
	case <-passes:
		return true
	case <-p.closed:
		return false
	}
}

func (p *proxy) serve(near net.Conn) {
	defer near.Close()
	if !p.whole() {
		return
	}
	far, err := net.Dial("tcp", p.far+":"+p.to.Load().(string))
	if err != nil {
		return
	}
	defer far.Close()
	p.mu.Lock()
	p.conns = append(p.conns, near, far)
	p.mu.Unlock()
	if !p.whole() { // closed since, perhaps before these were in conns
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.carry(near, far) })
	wg.Go(func() { p.carry(far, near) })
	wg.Wait()
}

func (p *proxy) carry(to, from net.Conn) {
	defer to.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if !p.whole() {
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

func (p *proxy) close() {
	p.listener.Close()
	close(p.closed)
	p.mu.Lock()
	for _, c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (w *world) cmdCut(ts *testscript.TestScript, args []string) {
	w.proxyOf(ts, args).cut()
}

// cut lets nothing through any more, and tells nobody.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.passes = make(chan struct{})
}

// mend undoes cut: what was on its way arrives.
func (p *proxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.passes)
}

func (w *world) cmdMend(ts *testscript.TestScript, args []string) {
	w.proxyOf(ts, args).mend()
}

func (w *world) proxyOf(ts *testscript.TestScript, args []string) *proxy {
	if len(args) != 1 || w.proxies[args[0]] == nil {
		ts.Fatalf("no proxy %q", args)
	}
	return w.proxies[args[0]]
}

var redisReady = regexp.MustCompile(`Ready to accept connections`)

func (w *world) cmdRedis(ts *testscript.TestScript, args []string) {
	switch args[0] {
	case "port":
		w.redisPort(ts)
	case "start":
		w.startRedis(ts, len(args) > 1 && args[1] == "-appendonly")
	case "kill9":
		w.redis.cmd.Process.Kill()
		w.within(ts, "redis", w.redis.wait)
		w.redis = nil
	case "hang":
		ts.Check(w.redis.cmd.Process.Signal(syscall.SIGSTOP))
	case "go":
		ts.Check(w.redis.cmd.Process.Signal(syscall.SIGCONT))
	default:
		ts.Fatalf("redis: port, start [-appendonly], kill9, hang or go")
	}
}

func (w *world) cmdRegistry(ts *testscript.TestScript, args []string) {
	if len(args) == 0 {
		ts.Fatalf("registry: start, stop or push")
	}
	switch {
	case args[0] == "start":
		w.startRegistry(ts, append(args[1:], "", ""))
	case args[0] == "stop":
		w.registry.Stop()
		w.registry = nil
	case args[0] == "push" && len(args) == 3:
		w.within(ts, "push", func(ctx context.Context) error { return w.lab.Push(ctx, w.registry, args[1], "VERSION="+args[2]) })
	default:
		ts.Fatalf("usage: registry start [USER PASSWORD] | stop | push REPOSITORY:TAG WORD")
	}
}

// cmdBoxes has the engine tell of the boxes it starts from now on.
func (w *world) cmdBoxes(*testscript.TestScript, []string) {
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	w.boxes, w.unwatch = newTape(), func() { cancel(); wg.Wait() }
	wg.Go(func() { w.lab.Boxes(ctx, func(image string) { fmt.Fprintln(w.boxes, image) }) })
}

// startRegistry starts it where it was before.
func (w *world) startRegistry(ts *testscript.TestScript, account []string) {
	dir := filepath.Join(w.dir, "registry")
	ts.Check(os.MkdirAll(dir, 0o700))
	r, err := dockertest.StartRegistry(dir, cmp.Or(w.registryAt, "127.0.0.1:0"), account[0], account[1])
	ts.Check(err)
	w.registry, w.registryAt = r, r.Addr
	ts.Setenv("REGISTRY", r.Addr)
}

// redisPort chooses the port, which stays the script's own.
func (w *world) redisPort(ts *testscript.TestScript) {
	if w.redisAt != "" {
		return
	}
	w.redisAt = redistest.Port(w.tb, "127.0.0.1")
	ts.Setenv("REDIS", w.redisAt)
}

// startRedis starts it without a disk, or with the files that it had before.
func (w *world) startRedis(ts *testscript.TestScript, disk bool) {
	w.redisPort(ts)
	argv := []string{"redis-server", "--port", w.redisAt, "--bind", "127.0.0.1", "--save", "", "--dir", w.dir, "--appendonly", "no"}
	if disk {
		argv = append(argv, "--appendonly", "yes", "--appendfsync", "always")
	}
	p, err := w.start(argv, w.env(ts), "", 0)
	ts.Check(err)
	w.redis = p
	w.within(ts, "redis start", func(ctx context.Context) error {
		_, err := p.both.await(ctx, redisReady)
		return err
	})
}

// cmdMirrored reads the mirror of a job to its end, waiting for it, and for the event of a
// state, which travels on its own.
func (w *world) cmdMirrored(ts *testscript.TestScript, args []string) {
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + w.redisAt, ReadTimeout: patience})
	defer c.Close()
	all := map[string][]byte{}
	w.within(ts, "mirrored", func(ctx context.Context) error {
		for last := "0"; all["end"] == nil; {
			got, err := c.XRead(ctx, &redis.XReadArgs{Streams: []string{"rai:log:" + args[0], last}, Block: patience}).Result()
			if err != nil {
				return err
			}
			for _, m := range got[0].Messages {
				last = m.ID
				if err := keepEntry(all, m); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if len(args) > 1 {
		w.within(ts, "mirrored", func(ctx context.Context) error { return awaitEvent(ctx, c, args[0], args[1]) })
	}
	for _, kind := range []string{"out", "err", "end"} {
		ts.Check(os.WriteFile(filepath.Join(w.dir, "mirror."+kind), all[kind], 0o644))
	}
}

// awaitEvent waits until the mirror's events tell of a job's state.
func awaitEvent(ctx context.Context, c *redis.Client, id, state string) error {
	for last := "0"; ; {
		got, err := c.XRead(ctx, &redis.XReadArgs{Streams: []string{"rai:events", last}, Block: patience}).Result()
		if err != nil {
			return err
		}
		for _, m := range got[0].Messages {
			if last = m.ID; m.Values["job"] == id && m.Values["state"] == state {
				return nil
			}
		}
	}
}

// keepEntry adds one entry. Its id is the offset of the log after it.
func keepEntry(all map[string][]byte, m redis.XMessage) error {
	kind, _ := m.Values["s"].(string)
	data, _ := m.Values["d"].(string)
	offset, _, _ := strings.Cut(m.ID, "-")
	if _, err := strconv.ParseInt(offset, 10, 64); err != nil || kind == "" {
		return fmt.Errorf("not an entry of ours: %v", m)
	}
	all[kind] = append(all[kind], data...)
	return nil
}
