package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	gliderssh "github.com/gliderlabs/ssh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/job"
)

func benchLogin(b *bench) {
	r := b.raids["main"]
	s := b.race(15,
		contestant{"raid", func() float64 { return timed(func() { b.do(r.server, fast, nil, "version") }) }},
		contestant{"sshd", func() float64 { return timed(func() { b.do(b.peer, fast, nil, "true") }) }})
	b.versus("login, trivial command", s["raid"], s["sshd"], "sshd", 0.1)
}

func benchEcho(b *bench) {
	warm, cold := b.raids["main"], b.raids["cold"]
	cs := []contestant{
		{"warm", func() float64 { return timed(func() { b.do(warm.server, fast, nil, "submit -- echo hi") }) }},
		{"cold", func() float64 { return timed(func() { b.do(cold.server, fast, nil, "submit -- echo hi") }) }},
	}
	if b.image == "" {
		s := b.race(11, cs...)
		b.plain("submit → exit of echo, warm box", s["warm"].in("ms"))
		b.skipRow("the same against docker run", b.why)
		return
	}
	s := b.race(9, append(cs, contestant{"docker", func() float64 {
		return timed(func() { b.do(b.peer, fast, nil, "docker run --rm "+b.image+" /echo") })
	}})...)
	b.versus("submit → exit of echo, warm box", s["warm"], s["docker"], "ssh docker run", 0.08)
	b.versus("the same, box started cold", s["cold"], s["docker"], "ssh docker run", 0)
}

// benchBox measures a box alone: from the order to the first byte it prints.
func benchBox(b *bench) {
	e, err := bwrap.New(context.Background(), bwrap.Config{ID: "bench-" + strconv.Itoa(os.Getpid()), Exe: filepath.Join(b.bin, "raid"), Args: []string{"shim"}})
	if err != nil {
		b.skipRow("start of a warm box: first byte", err.Error())
		return
	}
	defer e.Close()
	n := 0
	cs := []contestant{{"box", func() float64 { n++; return firstByte(b, e, n) }}}
	if b.image == "" {
		s := b.race(11, cs...)
		b.number("start of a warm box: first byte", s["box"].in("ms"), "≤ 5 ms", s["box"].median() <= 5)
		return
	}
	s := b.race(9, append(cs, contestant{"docker", func() float64 { return b.dockerFirstByte(b.image, "/echo") }})...)
	b.versus("start of a warm box: first byte", s["box"], s["docker"], "docker run", 0.03)
	b.number("the same, alone", s["box"].in("ms"), "≤ 5 ms", s["box"].median() <= 5)
}

func firstByte(b *bench, e box.Engine, n int) float64 {
	return orderToByte(b, b.readyBox(e, box.Config{ID: fmt.Sprintf("b%d", n), Limits: job.Limits{Memory: 1 << 30, Pids: 4096, Disk: 1 << 30}}))
}

// orderToByte gives a box its order, and removes it after its first byte.
func orderToByte(b *bench, x *openBox) float64 {
	b.Helper()
	defer x.Close()
	order, _ := json.Marshal(job.BoxOrder{Spec: job.Spec{Steps: []string{"echo hi"}, Limits: job.Limits{Time: time.Minute}}, Env: []string{"PATH=/usr/bin:/bin"}})
	return timed(func() {
		if err := job.WriteFrame(x.Stdin(), job.Order, order); err != nil {
			b.Fatal(err)
		}
		for {
			k, _, err := x.frames.Next()
			if err != nil {
				b.Fatal(err)
			}
			if k == job.Out {
				return
			}
		}
	})
}

// benchUpload sends 1 GiB to a raid whose one runner is busy, so that nothing runs
// besides.
func benchUpload(b *bench) {
	r := b.raids["remote"]
	busy := r.detach(b, "sleep 600")
	r.wait(b, busy, func(s job.State) bool { return s == job.Running })
	defer func() {
		r.ask(b, fmt.Sprintf("cancel %d", busy))
		r.wait(b, busy, job.State.Final)
	}()
	var before, most float64
	up := func(cipher string) float64 {
		in := b.freshBlob()
		defer in.Close()
		var said string
		var ms float64
		before, most = peak(b, r.pid, func() { ms = timed(func() { said = b.do(r.server, cipher, in, "submit --detach -- true") }) })
		r.ask(b, "cancel "+strconv.FormatInt(jobID(b, said), 10))
		b.dropBlobs(r)
		return ms
	}
	cat := func(cipher string) float64 {
		in := b.freshBlob()
		defer in.Close()
		file := filepath.Join(b.dir, "cat")
		defer os.Remove(file)
		return timed(func() { b.do(b.peer, cipher, in, "cat > "+file+" && sync "+file) })
	}
	s := b.race(3,
		contestant{"raid", func() float64 { return up(fast) }},
		contestant{"sshd", func() float64 { return cat(fast) }},
		contestant{"raid, default", func() float64 { return up("") }},
		contestant{"sshd, default", func() float64 { return cat("") }})
	b.versus("upload 1 GiB, aes128-gcm", s["raid"], s["sshd"], "cat > file && sync file", 1)
	b.versus("the same, a default client", s["raid, default"], s["sshd, default"], "cat > file && sync file", 0.8)
	b.number("memory of raid during an upload of 1 GiB", flat(before, most), "flat: ≤ +32 MiB", most-before <= 32)
}

func flat(before, most float64) string {
	return fmt.Sprintf("%s → at most %s MiB", number(before), number(most))
}

// freshBlob opens the blob after it was made another one: raid keeps the same upload
// only once.
func (b *bench) freshBlob() *os.File {
	f, err := os.OpenFile(b.blob, os.O_RDWR, 0)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := f.WriteAt(fmt.Appendf(nil, "%020d", time.Now().UnixNano()), 4096); err != nil {
		b.Fatal(err)
	}
	return f
}

// dropBlobs removes all uploads: the disk of a bench is not a server's.
func (b *bench) dropBlobs(r *raid) {
	filepath.WalkDir(filepath.Join(r.state, "blobs"), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			os.Remove(path)
		}
		return nil
	})
}

// printGiB prints 1 GiB as cat(1) does, in pieces of 128 KiB.
const printGiB = "dd if=/dev/zero bs=128k count=8192 status=none"

// benchLive follows a job that prints 1 GiB: local, with the mirror, and through a
// runner that reaches raid over SSH. The replay comes after it.
func benchLive(b *bench) {
	main := b.raids["main"]
	file := filepath.Join(b.dir, "blob.tar")
	var last int64
	var before, most float64
	live := func(name string) func() float64 {
		r := b.raids[name]
		return func() float64 {
			var said string
			var ms float64
			from, top := peak(b, r.pid, func() { ms = timed(func() { said = b.do(r.server, fast, nil, "submit -- "+printGiB) }) })
			id := jobID(b, said)
			if j := r.status(b, id); j.OutBytes != gib {
				b.Fatalf("job %d printed %d bytes", id, j.OutBytes)
			}
			if name != "main" {
				r.drop(id)
				return ms
			}
			if last != 0 {
				r.drop(last)
			}
			last, before, most = id, from, top
			return ms
		}
	}
	cat := contestant{"sshd", func() float64 { return timed(func() { b.do(b.peer, fast, nil, "cat "+file) }) }}
	s := b.race(3, contestant{"local", live("main")}, contestant{"mirror", live("mirror")}, contestant{"remote", live("remote")}, cat)
	b.versus("output 1 GiB live, local runner, mirror on", s["mirror"], s["sshd"], "ssh cat file", 1)
	b.versus("the same, no mirror", s["local"], s["sshd"], "ssh cat file", 1)
	b.versus("the same through `raid runner --server`", s["remote"], s["sshd"], "ssh cat file", 1.5)
	b.number("memory of raid during 1 GiB of live output", flat(before, most), "flat: ≤ +32 MiB", most-before <= 32)
	again := b.race(3,
		contestant{"replay", func() float64 {
			return timed(func() { b.do(main.server, fast, nil, "logs "+strconv.FormatInt(last, 10)) })
		}}, cat)
	b.versus("replay of the finished job", again["replay"], again["sshd"], "ssh cat file", 0.6)
	main.drop(last)
}

const lines = 1_000_000

// benchLines has a job write a million lines, each with a write(2) of its own.
func benchLines(b *bench) {
	r := b.raids["main"]
	bare := b.bareServer()
	s := b.race(3,
		contestant{"raid", func() float64 {
			return timed(func() {
				b.do(r.server, fast, nil, fmt.Sprintf(`submit -- perl -e '$|=1; print "line $_\n" for 1..%d'`, lines))
			})
		}},
		contestant{"bare", func() float64 { return timed(func() { b.do(bare, fast, nil, "lines") }) }})
	b.versus("1,000,000 short lines live", s["raid"], s["bare"], "a bare gliderlabs server", 0.3)
}

// bareServer is what one writes first with gliderlabs/ssh: a handler that prints.
func (b *bench) bareServer() server {
	signer, err := keys.LoadSigner(filepath.Join(b.dir, "host_key"), nil)
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := &gliderssh.Server{
		PublicKeyHandler: func(gliderssh.Context, gliderssh.PublicKey) bool { return true },
		Handler: func(s gliderssh.Session) {
			for i := range lines {
				fmt.Fprintf(s, "line %d\n", i+1)
			}
		},
	}
	srv.AddHostKey(signer)
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve(l) }()
	b.Cleanup(func() { srv.Close(); <-served })
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return server{login: "rai", port: port, key: b.peer.key, known: b.peer.known}
}

// ticks prints the time of the kernel's monotonic clock, in ns, every 3 ms.
const ticks = `perl -MTime::HiRes=clock_gettime,CLOCK_MONOTONIC -e '$|=1; for (1..300) { select undef,undef,undef,0.003; printf "%.0f\n", 1e9*clock_gettime(CLOCK_MONOTONIC) }'`

func benchLatency(b *bench) {
	var ours, mirrored, peer sample
	for range 3 {
		ours = append(ours, b.delays(b.raids["main"].command(fast, "submit -- "+ticks))...)
		mirrored = append(mirrored, b.delays(b.raids["mirror"].command(fast, "submit -- "+ticks))...)
		peer = append(peer, b.delays(b.peer.command(fast, ticks))...)
	}
	b.delayRow("one line, job → client", ours, peer)
	b.delayRow("the same, mirror on", mirrored, peer)
}

func (b *bench) delayRow(what string, ours, peer sample) {
	text := func(s sample) string {
		return fmt.Sprintf("p50 %s, p99 %s ms", number(s.median()), number(s.quantile(0.99)))
	}
	b.rows = append(b.rows, row{what, text(ours), "sshd: " + text(peer), fmt.Sprintf("%.2f ×", ours.median()/peer.median()),
		"p50 ≤ 0.8 ms", verdict(ours.median() <= 0.8)})
}

// delays reads times that ticks printed and says how old each is, in ms.
func (b *bench) delays(cmd *exec.Cmd) sample {
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	var all sample
	for in := bufio.NewScanner(out); in.Scan(); {
		var now unix.Timespec
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
		sent, err := strconv.ParseInt(in.Text(), 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, float64(now.Nano()-sent)/1e6)
	}
	if err := cmd.Wait(); err != nil || len(all) == 0 {
		b.Fatalf("%d lines, %v", len(all), err)
	}
	return all
}

// benchBlocked compares a job that prints 256 MiB to nobody with the same one printed
// to a reader that has stopped, and to a Redis that has.
func benchBlocked(b *bench) {
	main, mirror := b.raids["main"], b.raids["mirror"]
	s := b.race(5,
		contestant{"nobody", func() float64 { return b.printing(main, nil, nil) }},
		contestant{"stopped reader", func() float64 { return b.printingTo(main) }},
		contestant{"Redis", func() float64 { return b.printing(mirror, nil, nil) }},
		contestant{"stopped Redis", func() float64 {
			return b.printing(mirror, func() { b.redis.Signal(syscall.SIGSTOP) }, func() { b.redis.Signal(syscall.SIGCONT) })
		}})
	b.blockedRow("a job of 256 MiB, its reader stopped (ssh in SIGSTOP)", s["stopped reader"], s["nobody"], "nobody reads")
	b.blockedRow("a job of 256 MiB, Redis stopped (SIGSTOP)", s["stopped Redis"], s["Redis"], "Redis runs")
}

// blockedRow adds a row whose goal is how much longer ours may take.
func (b *bench) blockedRow(what string, ours, peer sample, peerName string) {
	longer := ours.median()/peer.median() - 1
	b.rows = append(b.rows, row{what, ours.in("ms"), peerName + ": " + peer.in("ms"), fmt.Sprintf("%+.1f %%", 100*longer),
		"< +1 %", verdict(longer < 0.01)})
}

// print256 says go, and prints half a second later.
const print256 = "echo go; sleep 0.5; dd if=/dev/zero bs=128k count=2048 status=none"

// printing runs the job with nobody attached and returns how long it printed. before
// is called as it begins, after once it has ended.
func (b *bench) printing(r *raid, before, after func()) float64 {
	if before != nil {
		before()
		defer after()
	}
	id := r.detach(b, print256)
	return float64(r.wait(b, id, job.State.Final).RunMS - 500)
}

// printingTo runs the job under an ssh that stops reading when it has seen the go.
func (b *bench) printingTo(r *raid) float64 {
	cmd := r.command(fast, "submit -- "+print256)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		b.Fatal(err)
	}
	cmd.Process.Signal(syscall.SIGSTOP)
	newest := b.newest(r)
	defer r.drop(newest)
	j := r.wait(b, newest, job.State.Final)
	cmd.Process.Signal(syscall.SIGCONT)
	n, _ := io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil || n != 256<<20 {
		b.Fatalf("after SIGCONT: %d bytes, %v\n%s", n, err, said.String())
	}
	return float64(j.RunMS - 500)
}

// newest is the id of the job submitted last.
func (b *bench) newest(r *raid) int64 {
	var j job.Job
	if err := json.Unmarshal(r.ask(b, "history -n 1 --json"), &j); err != nil {
		b.Fatal(err)
	}
	return j.ID
}

const idleSessions = 1000

// benchIdle attaches many clients to one job that has printed a little and waits.
func benchIdle(b *bench) {
	r := b.raids["main"]
	id := r.detach(b, "head -c 4096 /dev/zero; sleep 120")
	r.wait(b, id, func(s job.State) bool { return s == job.Running })
	before := memory(b, r.pid, "VmRSS")
	start := time.Now()
	var wg sync.WaitGroup
	clients := make([]*ssh.Client, idleSessions)
	for part := range 8 {
		wg.Go(func() {
			for i := part; i < idleSessions; i += 8 {
				clients[i] = r.server.dial(b)
				if err := attach(clients[i], id); err != nil {
					b.Errorf("client %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	each := (memory(b, r.pid, "VmRSS") - before) / idleSessions
	for _, c := range clients {
		if c != nil {
			c.Close()
		}
	}
	r.ask(b, fmt.Sprintf("cancel %d", id))
	b.Logf("%d sessions in %v", idleSessions, took)
	b.number(fmt.Sprintf("%d attached sessions, idle after output: resident memory", idleSessions), fmt.Sprintf("%.0f KiB each", each), "≤ 100 KiB", each <= 100)
}

// attach follows a job and returns when its output has come.
func attach(c *ssh.Client, id int64) error {
	s, err := c.NewSession()
	if err != nil {
		return err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.Start(fmt.Sprintf("attach %d", id)); err != nil {
		return err
	}
	_, err = io.ReadFull(out, make([]byte, 4096))
	return err
}
