package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/charmbracelet/log"
	"github.com/hibiken/asynq"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/redistest"
)

// benchQueue drives brain and SQLite in this process: a cycle is a submit, a lease and
// a finish, each durable before the next. The peer is asynq on a Redis that syncs every
// write, as SQLite does.
func benchQueue(b *bench) {
	st := b.openStore("queue")
	defer st.Close()
	br, stop := b.startBrain(st)
	defer stop()
	peer := b.startAsynq("always")
	defer peer.stop()
	var ones, manies, asynqs, asynqOnes, offers, called sample
	for range 3 {
		one, _ := b.cycles(br, 1, 2*time.Second)
		many, _ := b.cycles(br, 256, 4*time.Second)
		ones, manies = append(ones, one), append(manies, many)
		asynqOnes = append(asynqOnes, peer.rate(1, 500))
		asynqs = append(asynqs, peer.rate(256, 20_000))
	}
	offers = b.offerDelays(300)
	called = peer.delays(15)
	b.rate("submit + lease + finish, durable, SQLite, 1 client", ones, asynqOnes, 0)
	b.rate("the same, 256 clients", manies, asynqs, 20_000)
	p50, p99 := offers.median(), offers.quantile(0.99)
	b.rows = append(b.rows, row{"commit returned → offer read by an idle runner, over SSH",
		fmt.Sprintf("p50 %s, p99 %s ms", number(p50), number(p99)),
		fmt.Sprintf("asynq, to its handler: p50 %s ms", number(called.median())),
		number(p50/called.median()) + " ×", "p50 ≤ 0.5, p99 ≤ 2 ms", verdict(p50 <= 0.5 && p99 <= 2)})
}

// rate adds a row of rates, of which more is better. A goal of 0 is none.
func (b *bench) rate(what string, ours, peer sample, goal float64) {
	r := row{what, fmt.Sprintf("%.0f (%.0f–%.0f) /s", ours.median(), ours.sorted()[0], ours.sorted()[len(ours)-1]),
		fmt.Sprintf("asynq, Redis, appendfsync always: %.0f /s", peer.median()), number(ours.median()/peer.median()) + " ×", "—", ""}
	if goal > 0 {
		r.goal, r.verdict = fmt.Sprintf("≥ %.0f /s", goal), verdict(ours.median() >= goal)
	}
	b.rows = append(b.rows, r)
}

func (b *bench) openStore(name string) store.Store {
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	st, err := store.OpenSQLite(context.Background(), dir, nil, jobsView)
	if err != nil {
		b.Fatal(err)
	}
	return st
}

// An asynqPeer is asynq with a Redis of its own.
type asynqPeer struct {
	*bench
	addr    string // of that Redis
	client  *asynq.Client
	handled sync.Map // task → channel that its handler closes
	seq     atomic.Int64
	stop    func()
}

func (b *bench) startAsynq(fsync string) *asynqPeer {
	port := redistest.Port(b, "127.0.0.1")
	db := redistest.StartPlain(b, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", fsync, "--dir", b.TempDir())
	to := asynq.RedisClientOpt{Addr: "127.0.0.1:" + port}
	p := &asynqPeer{bench: b, addr: to.Addr, client: asynq.NewClient(to)}
	srv := asynq.NewServer(to, asynq.Config{Concurrency: 256, LogLevel: asynq.FatalLevel})
	err := srv.Start(asynq.HandlerFunc(func(_ context.Context, t *asynq.Task) error {
		if done, ok := p.handled.LoadAndDelete(string(t.Payload())); ok {
			close(done.(chan struct{}))
		}
		return nil
	}))
	if err != nil {
		b.Fatal(err)
	}
	p.stop = func() {
		p.client.Close()
		srv.Shutdown()
		db.Kill()
	}
	return p
}

// enqueue returns a channel that is closed when the task's handler runs.
func (p *asynqPeer) enqueue() <-chan struct{} {
	name, done := fmt.Sprint(p.seq.Add(1)), make(chan struct{})
	p.handled.Store(name, done)
	if _, err := p.client.Enqueue(asynq.NewTask("job", []byte(name))); err != nil {
		p.Error(err)
	}
	return done
}

// rate enqueues n tasks from so many clients and waits for all: clients that waited for
// one task before the next would measure nothing but asynq's polling.
func (p *asynqPeer) rate(clients, n int) float64 {
	var wg sync.WaitGroup
	start := time.Now()
	for part := range clients {
		wg.Go(func() {
			var all []<-chan struct{}
			for i := part; i < n; i += clients {
				all = append(all, p.enqueue())
			}
			for _, done := range all {
				<-done
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(start).Seconds()
}

// delays returns how long after its enqueue an idle server handles a task, in ms.
func (p *asynqPeer) delays(n int) (all sample) {
	for range n {
		done := p.enqueue()
		start := time.Now()
		<-done
		all = append(all, float64(time.Since(start).Microseconds())/1000)
	}
	return all
}

// offerDelays runs a server in this process and an idle runner that dials it, and
// returns how long after the commit of a job the runner has read its offer, in ms.
func (b *bench) offerDelays(n int) (all sample) {
	clock := &commitClock{Store: b.openStore("offers")}
	defer clock.Close()
	runner := b.idleRunner(clock)
	for i := range n + 10 {
		offer := runner.next()
		read := time.Now()
		if offer.Job != int64(i+1) {
			b.Fatalf("offer %+v, want job %d", offer, i+1)
		}
		if i >= 10 { // the first ones warm up
			all = append(all, float64(read.Sub(clock.granted()).Microseconds())/1000)
		}
	}
	return all
}

// A commitClock is a store that notes when the last commit with a grant returned.
type commitClock struct {
	store.Store
	mu sync.Mutex // guards the following
	at time.Time
}

func (c *commitClock) Commit(ctx context.Context, prev store.Rev, writes []queue.Write) (store.Rev, error) {
	rev, err := c.Store.Commit(ctx, prev, writes)
	now := time.Now()
	for _, w := range writes {
		if w.Table == queue.TableJob && w.New { // the runner is idle: submitted is granted
			c.mu.Lock()
			c.at = now
			c.mu.Unlock()
		}
	}
	return rev, err
}

func (c *commitClock) granted() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

// An idleRunner speaks the runner's side of the protocol to a server in this process,
// beside a student who submits whenever it waits.
type idleRunner struct {
	*bench
	runner, student *ssh.Client
	lines           *json.Decoder
	beats           *json.Encoder
	held            *job.Offer
}

// idleRunner starts a server on st, which stops when the bench ends.
func (b *bench) idleRunner(st store.Store) *idleRunner {
	host, runner, student := dialtest.Signer(b), dialtest.Signer(b), dialtest.Signer(b)
	c := defaults()
	srv, err := sshd.New(context.Background(), sshd.Config{Dir: filepath.Join(b.dir, "offers"), HostKeys: []ssh.Signer{host}, Store: st,
		Policy: c.policy(), Pools: c.pools(runtime.GOARCH), Limits: c.limits(), Log: log.New(io.Discard)})
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, l, time.Second) }()
	for _, e := range []keys.Enrollment{{User: "gpu1", Role: keys.Runner, Email: "gpu1@example.edu", Key: dialtest.Line(runner)},
		{User: "ada", Role: keys.Student, Email: "ada@example.edu", Key: dialtest.Line(student)}} {
		if _, _, err := srv.Enrol(ctx, e, "bench"); err != nil {
			b.Fatal(err)
		}
	}
	r := &idleRunner{bench: b, runner: b.dial(l.Addr().String(), runner), student: b.dial(l.Addr().String(), student)}
	b.Cleanup(func() {
		r.runner.Close()
		r.student.Close()
		cancel()
		<-served
	})
	s, in, out := r.session(r.runner)
	if err := s.Start("runner join"); err != nil {
		b.Fatal(err)
	}
	r.beats, r.lines = json.NewEncoder(in), json.NewDecoder(out)
	r.beats.Encode(job.Hello{Protocol: job.Protocol, Name: "gpu1", Pools: c.pools(runtime.GOARCH)})
	return r
}

// next ends what the runner holds, has a job submitted and returns its offer as soon
// as it is read.
func (r *idleRunner) next() job.Offer {
	if r.held != nil {
		r.finish()
	}
	r.beats.Encode(job.Beat{Idle: true})
	for call := r.call(); !call.Beat; call = r.call() { // the idle runner is known
	}
	submitted := make(chan error, 1)
	go func() {
		s, err := r.student.NewSession()
		if err == nil {
			err = s.Run("submit --detach -- true")
		}
		submitted <- err
	}()
	for {
		if call := r.call(); call.Offer != nil {
			defer func() {
				if err := <-submitted; err != nil {
					r.Fatal(err)
				}
			}()
			r.held = call.Offer
			return *call.Offer
		}
	}
}

func (r *idleRunner) call() (c job.Call) {
	if err := r.lines.Decode(&c); err != nil {
		r.Fatal(err)
	}
	return c
}

// finish delivers a result.
func (r *idleRunner) finish() {
	s, in, out := r.session(r.runner)
	defer s.Close()
	if err := s.Start(fmt.Sprintf("runner attempt %d %d", r.held.Job, r.held.Fence)); err != nil {
		r.Fatal(err)
	}
	result, _ := json.Marshal(job.Result{Reason: job.ReasonExit, Begun: true})
	for _, err := range []error{job.WriteFrame(in, job.Sealed, nil), job.WriteFrame(in, job.Final, result)} {
		if err != nil {
			r.Fatal(err)
		}
	}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "done"; {
	}
	r.held = nil
}

func (r *idleRunner) session(c *ssh.Client) (*ssh.Session, io.Writer, io.Reader) {
	s, err := c.NewSession()
	if err != nil {
		r.Fatal(err)
	}
	in, err1 := s.StdinPipe()
	out, err2 := s.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		r.Fatal(err)
	}
	return s, in, out
}

func (b *bench) dial(addr string, key ssh.Signer) *ssh.Client {
	c, err := ssh.Dial("tcp", addr, &ssh.ClientConfig{User: "rai", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, Timeout: 10 * time.Second})
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func (b *bench) startBrain(st store.Store) (*brain.Brain, func()) {
	br, err := brain.New(context.Background(), brain.Config{Store: st, Policy: queue.DefaultPolicy(), Logf: b.Logf})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- br.Run(ctx) }()
	return br, func() {
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	}
}

func aJob(user string) queue.Submit {
	return queue.Submit{Record: job.Record{Job: job.Job{User: user, Pool: "p", Kind: "run"},
		Spec: job.Spec{Steps: []string{"true"}, Limits: job.Limits{Time: time.Hour}}}}
}

// cycles runs so many clients and as many runners for so long, all in one pool: each
// client submits a job and waits for its end, each runner takes whatever comes. It
// returns cycles a second, and how long after the call of a submit its offer was read,
// in ms: the commit is part of that, because an offer may be read before the submit
// has returned.
func (b *bench) cycles(br *brain.Brain, n int, long time.Duration) (rate float64, waits sample) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	var runners, clients sync.WaitGroup
	var read sync.Map // job → when its offer was read
	var mu sync.Mutex
	total := 0
	links := make([]*brain.Link, n)
	for i := range links {
		name := fmt.Sprintf("runner%d", i)
		l, err := br.Join(context.Background(), queue.Runner{ID: name, Name: name, Pools: []string{"p"}}, nil)
		if err != nil {
			b.Fatal(err)
		}
		links[i] = l
		runners.Go(func() { b.serveOffers(br, l, name, &read) })
	}
	start := time.Now()
	for i := range n {
		clients.Go(func() {
			k, ws := b.submitAndWait(ctx, br, fmt.Sprintf("user%d", i), &read)
			mu.Lock()
			defer mu.Unlock()
			total, waits = total+k, append(waits, ws...)
		})
	}
	clients.Wait()
	rate = float64(total) / time.Since(start).Seconds()
	for _, l := range links {
		l.Leave(context.Background())
	}
	runners.Wait()
	return rate, waits
}

// serveOffers is a runner whose jobs take no time, until its link ends.
func (b *bench) serveOffers(br *brain.Brain, l *brain.Link, name string, read *sync.Map) {
	back := context.Background()
	for {
		if err := l.Beat(back, job.Beat{Idle: true}); err != nil {
			return
		}
		call, ok := <-l.Calls()
		if !ok || call.Offer == nil {
			return
		}
		read.Store(call.Offer.Job, time.Now())
		done := queue.Finish{Runner: name, Lease: call.Offer.Lease, Result: job.Result{Reason: job.ReasonExit, Begun: true}}
		if _, err := br.Do(back, done); err != nil {
			b.Error(err)
			return
		}
	}
}

// submitAndWait submits one job after another and waits for the end of each.
func (b *bench) submitAndWait(ctx context.Context, br *brain.Brain, user string, read *sync.Map) (n int, waits sample) {
	for ctx.Err() == nil {
		sent := time.Now()
		reply, err := br.Do(context.Background(), aJob(user))
		if err != nil {
			b.Error(err)
			return n, waits
		}
		id := reply.(*job.Record).ID
		for bell := br.Bell(id); bell != nil; bell = br.Bell(id) {
			<-bell
		}
		at, _ := read.LoadAndDelete(id)
		waits = append(waits, float64(at.(time.Time).Sub(sent).Microseconds())/1000)
		n++
	}
	return n, waits
}

const queued = 100_000

// benchRestart fills a queue, starts raid on it and looks when the first job ran.
func benchRestart(b *bench) {
	state := filepath.Join(b.dir, "restart")
	if err := os.MkdirAll(state, 0o700); err != nil {
		b.Fatal(err)
	}
	b.fill(state)
	start := time.Now()
	r := b.startRaid(b.T, "restart", "")
	listens := time.Since(start)
	j := r.wait(b, 1, func(s job.State) bool { return s != job.Queued })
	ms := float64(j.StartedAt.Sub(start).Milliseconds())
	syscall.Kill(r.pid, syscall.SIGKILL) // or it would run the other 99,999
	syscall.Kill(r.runnerPID(b), goNow)  // it removes its boxes, and has nobody to deliver its job to
	b.Logf("listens after %v", listens)
	b.number("restart with 100,000 queued jobs → first dispatch", fmt.Sprintf("%.0f ms", ms), "≤ 2,000 ms", ms <= 2000)
}

// fill queues jobs of 1,000 people into the store of a state folder.
func (b *bench) fill(state string) {
	st, err := store.OpenSQLite(context.Background(), state, nil, jobsView)
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	br, stop := b.startBrain(st)
	defer stop()
	c := defaults()
	pool := c.pools(runtime.GOARCH)[0]
	var wg sync.WaitGroup
	for part := range 256 {
		wg.Go(func() {
			for i := part; i < queued; i += 256 {
				submit := aJob(fmt.Sprintf("user%d", i%1000))
				submit.Record.Pool = pool
				if _, err := br.Do(context.Background(), submit); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
