package sshd

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// These tests are runners that lie, die and come twice.

// A peer is one connection of a runner.
type peer struct {
	t *testing.T
	c *ssh.Client
}

func (s *site) peer(t *testing.T, who string) *peer {
	t.Helper()
	c, err := ssh.Dial("tcp", s.addr, &ssh.ClientConfig{User: "rai", HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		Auth: []ssh.AuthMethod{ssh.PublicKeys(s.keys[who])}, Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &peer{t, c}
}

// A talk is one session of a runner.
type talk struct {
	t *testing.T
	s *ssh.Session
	w io.WriteCloser
	r *bufio.Reader
}

func (p *peer) start(command string) *talk {
	p.t.Helper()
	s, err := p.c.NewSession()
	if err != nil {
		p.t.Fatal(err)
	}
	w, err := s.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	r, err := s.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := s.Start(command); err != nil {
		p.t.Fatal(err)
	}
	return &talk{p.t, s, w, bufio.NewReader(r)}
}

// line returns the next line, "" at the end.
func (k *talk) line() string {
	line, err := k.r.ReadString('\n')
	if err != nil && err != io.EOF {
		k.t.Fatal(err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (k *talk) want(line string) {
	k.t.Helper()
	if got := k.line(); got != line {
		k.t.Fatalf("raid said %q, want %q", got, line)
	}
}

func (k *talk) send(kind job.Kind, payload string) {
	k.t.Helper()
	if err := job.WriteFrame(k.w, kind, []byte(payload)); err != nil {
		k.t.Fatal(err)
	}
}

func (k *talk) say(v any) {
	k.t.Helper()
	if err := json.NewEncoder(k.w).Encode(v); err != nil {
		k.t.Fatal(err)
	}
}

// join opens the standing session of a runner that wants work and returns its offer.
func (p *peer) join(held *job.Lease) (*talk, job.Offer) {
	p.t.Helper()
	k := p.start("runner join")
	k.say(job.Hello{Protocol: job.Protocol, Name: "gpu1", Pools: []string{"rai_amd64"}, Held: held})
	k.say(job.Beat{Idle: held == nil, Held: held})
	for {
		var c job.Call
		if err := json.Unmarshal([]byte(k.line()), &c); err != nil {
			p.t.Fatal(err)
		}
		if c.Offer != nil {
			return k, *c.Offer
		}
		if held != nil && c.Beat {
			return k, job.Offer{}
		}
	}
}

func (p *peer) attempt(l job.Lease) *talk {
	p.t.Helper()
	return p.start(fmt.Sprintf("runner attempt %d %d", l.Job, l.Fence))
}

// follow runs a command as ada in the background.
func (s *site) follow(t *testing.T, command string) (result func() (string, string, int)) {
	type end struct {
		out, err string
		status   int
	}
	c := make(chan end, 1)
	go func() {
		out, stderr, status := s.say(t, "ada", command, nil)
		c <- end{out, stderr, status}
	}()
	return func() (string, string, int) {
		t.Helper()
		select {
		case e := <-c:
			return e.out, e.err, e.status
		case <-time.After(20 * time.Second):
			t.Fatalf("%q has not ended", command)
			return "", "", 0
		}
	}
}

// A job whose runner dies three times ends, and so does everybody who follows it.
func TestRunnerDiesTooOften(t *testing.T) {
	s := newSite(t)
	submitted := s.follow(t, "submit -- true")
	var logs func() (string, string, int)
	for n := 1; n <= 3; n++ {
		p := s.peer(t, "gpu1")
		_, o := p.join(nil)
		if o.Attempt != n {
			t.Fatalf("attempt %d, want %d", o.Attempt, n)
		}
		k := p.attempt(o.Lease)
		k.want("have 0")
		k.send(job.Begun, "")
		k.send(job.Out, fmt.Sprintf("attempt %d\n", n))
		if n == 1 {
			logs = s.follow(t, "logs 1 -f")
		}
		p.c.Close()
	}
	s.peer(t, "gpu1").start("runner join").say(job.Hello{Protocol: job.Protocol, Name: "gpu1", Pools: []string{"rai_amd64"}})
	if _, stderr, status := submitted(); status != job.ExitInfra {
		t.Errorf("submit = %d, %q, want %d", status, stderr, job.ExitInfra)
	}
	if _, stderr, status := logs(); status != 0 {
		t.Errorf("logs -f = %d, %q, want 0", status, stderr)
	}
}

// A job that is cancelled while it waits ends for those who follow its output only.
func TestCancelledInTheQueue(t *testing.T) {
	s := newSite(t)
	if _, stderr, status := s.say(t, "ada", "submit --detach -- true", nil); status != 0 {
		t.Fatalf("submit = %d, %q", status, stderr)
	}
	logs, attach := s.follow(t, "logs 1 -f"), s.follow(t, "attach 1")
	s.say(t, "ada", "cancel 1", nil)
	if _, stderr, status := logs(); status != 0 {
		t.Errorf("logs -f = %d, %q, want 0", status, stderr)
	}
	if _, stderr, status := attach(); status != job.ExitCancelled {
		t.Errorf("attach = %d, %q, want %d", status, stderr, job.ExitCancelled)
	}
}

// The bytes of an older session that come in after a newer one has begun are not
// taken: the newer one brings them, too.
func TestTwoSessionsOfOneAttempt(t *testing.T) {
	s := newSite(t)
	submitted := s.follow(t, "submit -- true")
	old := s.peer(t, "gpu1")
	_, o := old.join(nil)
	first := old.attempt(o.Lease)
	first.want("have 0")
	first.send(job.Out, "one\n")
	fresh := s.peer(t, "gpu1")
	fresh.join(&o.Lease)
	second := fresh.attempt(o.Lease)
	var have int
	if _, err := fmt.Sscanf(second.line(), "have %d", &have); err != nil {
		t.Fatal(err)
	}
	first.send(job.Out, "two\n") // late, through the connection that the runner gave up
	first.want("")
	frames := job.AppendFrame(job.AppendFrame(nil, job.Out, []byte("one\n")), job.Out, []byte("two\n"))
	if _, err := second.w.Write(frames[have:]); err != nil {
		t.Fatal(err)
	}
	second.send(job.Sealed, "")
	second.send(job.Final, `{"reason":"exit","exit":0}`)
	second.want("done")
	if out, stderr, status := submitted(); out != "one\ntwo\n" || status != 0 {
		t.Errorf("submit = %d, %q, %q, want one, two, once each", status, out, stderr)
	}
}

// What a runner may not say ends its session and changes nothing; an honest session
// after it brings the job to its end.
func TestRunnerLies(t *testing.T) {
	s := newSite(t)
	gap := "\x10\x00\x00\x00\x00\x00\x00\x00" // 2^60
	for i, tt := range []struct {
		name string
		lie  func(k *talk)
	}{
		{"gap beyond all bounds", func(k *talk) { k.send(job.Gap, gap) }},
		{"gap of no bytes", func(k *talk) { k.send(job.Gap, "\x00\x00\x00\x00\x00\x00\x00\x00") }},
		{"short gap", func(k *talk) { k.send(job.Gap, "x") }},
		{"unknown kind", func(k *talk) { k.w.Write([]byte("Z\x00\x00\x00\x00")) }},
		{"huge frame", func(k *talk) { k.w.Write([]byte("o\xff\xff\xff\xff")) }},
		{"ready", func(k *talk) { k.send(job.Ready, "") }},
		{"order", func(k *talk) { k.send(job.Order, "{}") }},
		{"stop", func(k *talk) { k.send(job.Stop, "timeout") }},
		{"grown without sharing", func(k *talk) { k.send(job.Grown, gap) }},
		{"file before sealed", func(k *talk) { k.send(job.File, "x") }},
		{"output after sealed", func(k *talk) { k.send(job.Sealed, ""); k.send(job.Out, "x") }},
		{"result that is no JSON", func(k *talk) { k.send(job.Final, "boom") }},
		{"deep JSON", func(k *talk) { k.send(job.Final, strings.Repeat("[", 1<<19)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			submitted := s.follow(t, "submit -- true")
			p := s.peer(t, "gpu1")
			_, o := p.join(nil)
			if o.Job != int64(i+1) || o.Attempt != 1 {
				t.Fatalf("offer = job %d, attempt %d, want job %d, attempt 1", o.Job, o.Attempt, i+1)
			}
			liar := p.attempt(o.Lease)
			liar.want("have 0")
			tt.lie(liar)
			liar.want("")
			honest := p.attempt(o.Lease)
			if line := honest.line(); !strings.HasPrefix(line, "have ") {
				t.Fatalf("raid said %q, want have", line)
			}
			honest.send(job.Sealed, "")
			honest.send(job.Final, `{"reason":"exit","exit":9}`)
			honest.want("done")
			if _, stderr, status := submitted(); status != 9 {
				t.Errorf("submit = %d, %q, want 9", status, stderr)
			}
			p.c.Close()
		})
	}
	if left, err := filepath.Glob(filepath.Join(s.Dir, "incoming", "*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A result that makes no sense is the runner's failure, never the job's.
func TestResultsThatMakeNoSense(t *testing.T) {
	s := newSite(t)
	for _, result := range []string{`{}`, `{"reason":"won"}`, `{"reason":"exit","exit":-1}`, `{"reason":"exit","exit":4294967296}`,
		`{"reason":"timeout","exit":0}`, `{"reason":"exit","note":"` + strings.Repeat("x", 1<<18) + `"}`} {
		submitted := s.follow(t, "submit -- true")
		var out string
		for range 3 {
			p := s.peer(t, "gpu1")
			_, o := p.join(nil)
			k := p.attempt(o.Lease)
			k.want("have 0")
			k.send(job.Sealed, "")
			k.send(job.Final, result)
			k.want("done")
			p.c.Close()
		}
		if _, stderr, status := submitted(); status != job.ExitInfra {
			t.Errorf("%.60s: submit = %d, %q, %q, want %d", result, status, out, stderr, job.ExitInfra)
		}
	}
}

// A store that begins again gives numbers that had output once. The new job is not
// hurt by it, and shows nothing of it.
func TestNumbersThatBeginAgain(t *testing.T) {
	s := newSite(t, func(c *Config) {
		backup := queue.Write{Row: queue.Row{Table: queue.TableMeta, Key: "core", Value: []byte(`{"next":2}`)}}
		if _, err := c.Store.Commit(t.Context(), 0, []queue.Write{backup}); err != nil {
			t.Fatal(err)
		}
		old := filepath.Join(c.Dir, "spool", "2", "1")
		if err := os.MkdirAll(old, 0o700); err != nil {
			t.Fatal(err)
		}
		segment := job.AppendFrame(nil, job.Out, []byte("somebody else's\n"))
		if err := os.WriteFile(filepath.Join(old, fmt.Sprintf("%016x.seg", 0)), segment, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	submitted := s.follow(t, "submit -- true")
	p := s.peer(t, "gpu1")
	_, o := p.join(nil)
	k := p.attempt(o.Lease)
	k.want("have 0")
	k.send(job.Sealed, "")
	k.send(job.Final, `{"reason":"exit","exit":0}`)
	k.want("done")
	if out, stderr, status := submitted(); out != "" || status != 0 {
		t.Errorf("submit = %d, %q, %q, want 0 and nothing", status, out, stderr)
	}
}

// Only the key that holds a lease, with its fence, comes to a job.
// TestLostStore: output without a single job in the store is not rubbish.
func TestLostStore(t *testing.T) {
	dir := t.TempDir()
	old := filepath.Join(dir, "spool", "1", "1")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	c := Config{Dir: dir, HostKeys: []ssh.Signer{newSigner(t)}, Store: store.NewMemory(), Pools: []string{"p"}, Log: log.New(io.Discard)}
	if _, err := New(t.Context(), c); !errors.Is(err, ErrLostStore) {
		t.Errorf("New = %v, want ErrLostStore", err)
	}
	if _, err := os.Stat(old); err != nil {
		t.Errorf("the output is gone: %v", err)
	}
}

func TestFences(t *testing.T) {
	s := newSite(t)
	submitted := s.follow(t, "submit -- true")
	p := s.peer(t, "gpu1")
	_, o := p.join(nil)
	l := o.Lease
	for _, wrong := range []job.Lease{{Job: l.Job, Fence: l.Fence + 1}, {Job: l.Job}, {Job: l.Job + 1, Fence: l.Fence}, {}} {
		p.attempt(wrong).want("stale")
		if out := p.start(fmt.Sprintf("runner source %d %d", wrong.Job, wrong.Fence)); out.line() != "" || out.s.Wait() == nil {
			t.Errorf("source of %v was given", wrong)
		}
	}
	for _, who := range []string{"ada", "admin"} {
		for _, command := range []string{"runner attempt %d %d", "runner source %d %d"} {
			if out, _, status := s.say(t, who, fmt.Sprintf(command, l.Job, l.Fence), nil); status == 0 || strings.Contains(out, "have") {
				t.Errorf("%s as %s = %d, %q, want a refusal", command, who, status, out)
			}
		}
	}
	k := p.attempt(l)
	k.want("have 0")
	k.send(job.Sealed, "")
	k.send(job.Final, `{"reason":"exit","exit":0}`)
	k.send(job.Final, `{"reason":"exit","exit":1}`) // a second result is not read
	k.want("done")
	if _, stderr, status := submitted(); status != 0 {
		t.Errorf("submit = %d, %q, want 0", status, stderr)
	}
	p.attempt(l).want("stale")
	if _, err := os.Stat(s.incoming(l)); err == nil {
		t.Error("a stale session left a file")
	}
}

// TestStaleWrites: of an attempt that is over, of another runner's and of a job that has
// ended, nothing a runner sends or asks for is taken, and nothing changes by it.
func TestStaleWrites(t *testing.T) {
	s := newSite(t)
	for _, name := range []string{"gpu2", "gpu3"} {
		s.keys[name] = newSigner(t)
		if _, _, err := s.Enrol(t.Context(), keys.Enrollment{User: name, Role: keys.Runner, Key: publicLine(s.keys[name])}, "test"); err != nil {
			t.Fatal(err)
		}
	}
	submitted := s.follow(t, "submit -- true")
	dead := s.peer(t, "gpu1")
	_, first := dead.join(nil)
	dead.attempt(first.Lease).want("have 0")
	dead.c.Close()
	p := s.peer(t, "gpu1") // without the lease: it is over, and the job is granted again
	_, second := p.join(nil)
	if second.Attempt != 2 || second.Fence <= first.Fence {
		t.Fatalf("the second offer is %+v after %+v", second.Lease, first.Lease)
	}
	other := s.peer(t, "gpu2")
	k := p.attempt(second.Lease)
	k.want("have 0")
	k.send(job.Begun, "")
	for { // until that has been taken
		bell := s.brain.Bell(second.Job)
		if rec, _ := s.brain.Live(second.Job); rec.Begun {
			break
		}
		<-bell
	}
	for _, tt := range []struct {
		name string
		by   *peer
		l    job.Lease
	}{
		{"an old fence", p, first.Lease},
		{"a fence that was never given", p, job.Lease{Job: second.Job, Fence: second.Fence + 1}},
		{"another runner's lease", other, second.Lease},
		{"another runner's old lease", other, first.Lease},
		{"a job that does not exist", p, job.Lease{Job: 99, Fence: second.Fence}},
	} {
		t.Run(tt.name, func(t *testing.T) { s.refuses(t, tt.by, tt.l) })
	}
	k.send(job.Out, "two\n")
	k.send(job.Sealed, "")
	k.send(job.Final, `{"reason":"exit","exit":0}`)
	k.want("done")
	if out, stderr, status := submitted(); out != "two\n" || status != 0 {
		t.Errorf("submit = %d, %q, %q, want 0 and two", status, out, stderr)
	}
	for name, l := range map[string]job.Lease{"a finished attempt": second.Lease, "an old one of a finished job": first.Lease} {
		t.Run(name, func(t *testing.T) { s.refuses(t, p, l) })
	}
}

// refuses tries everything a runner can do with a lease that is not its own.
func (s *site) refuses(t *testing.T, p *peer, l job.Lease) {
	t.Helper()
	before := s.everything(t)
	for name, try := range map[string]func() string{
		"source": func() string {
			k := p.start(fmt.Sprintf("runner source %d %d", l.Job, l.Fence))
			return k.line() + exitOf(k)
		},
		"attempt": func() string {
			k := p.attempt(l)
			return k.line() + exitOf(k)
		},
		"attempt that shares files": func() string {
			k := p.start(fmt.Sprintf("runner attempt %d %d share", l.Job, l.Fence))
			return k.line() + exitOf(k)
		},
		"attempt that does not wait for an answer": func() string {
			k := p.attempt(l)
			all := job.AppendFrame(nil, job.Begun, nil)
			for kind, text := range map[job.Kind]string{job.Out: "stale\n", job.Err: "stale\n", job.Raid: "stale\n"} {
				all = job.AppendFrame(all, kind, []byte(text))
			}
			all = job.AppendFrame(job.AppendFrame(all, job.Sealed, nil), job.File, []byte("stale"))
			k.w.Write(job.AppendFrame(all, job.Final, []byte(`{"reason":"exit","exit":7}`))) // may find it closed
			return k.line() + exitOf(k)
		},
	} {
		if got := try(); got != "stale"+errExit && got != errExit {
			t.Errorf("%s was answered %q, want a refusal", name, got)
		}
	}
	if got := s.everything(t); got != before {
		t.Errorf("something has changed:\n%s\nwas\n%s", got, before)
	}
	s.refusesBeat(t, l)
	if got := s.everything(t); got != before {
		t.Errorf("something has changed by a beat or a join:\n%s\nwas\n%s", got, before)
	}
}

// errExit is what exitOf says of a refusal.
var errExit = fmt.Sprintf(" exit %d", job.ExitRefused)

func exitOf(k *talk) string {
	var exit *ssh.ExitError
	if err := k.s.Wait(); errors.As(err, &exit) {
		return fmt.Sprintf(" exit %d", exit.ExitStatus())
	} else if err != nil {
		return err.Error()
	}
	return " exit 0"
}

// refusesBeat has a third runner join and beat with the lease: it is told that the lease
// is stale.
func (s *site) refusesBeat(t *testing.T, l job.Lease) {
	t.Helper()
	for name, held := range map[string][2]*job.Lease{"join": {&l, nil}, "beat": {nil, &l}} {
		k := s.peer(t, "gpu3").start("runner join")
		k.say(job.Hello{Protocol: job.Protocol, Name: "x", Held: held[0]})
		k.say(job.Beat{Held: held[1]})
		const more = 20 // answers to beats, among which the word about the lease may come
		for range more {
			k.say(job.Beat{})
		}
		stale := false
		for beats := 0; !stale && beats < more+1; {
			var c job.Call
			if err := json.Unmarshal([]byte(k.line()), &c); err != nil {
				t.Fatal(err)
			}
			if stale = c.Stale != nil && *c.Stale == l; c.Beat {
				beats++
			}
		}
		if !stale {
			t.Errorf("a %s with the lease was not told that it is stale", name)
		}
		k.s.Close()
	}
}

// everything is all that a runner could change: the store's rows but for who is
// connected, and the files.
func (s *site) everything(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	_, err := s.Store.Load(t.Context(), []string{queue.TableMeta, queue.TableNode, queue.TableJob, queue.TablePast}, func(r queue.Row) error {
		fmt.Fprintf(&b, "%s %s %s\n", r.Table, r.Key, r.Value)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"spool", "incoming", "blobs"} {
		err := filepath.WalkDir(filepath.Join(s.Dir, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			fmt.Fprintf(&b, "%s %q\n", path, text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// TestOutputWithoutStore: while nothing can be saved, the output of a running job comes
// all the same, on a new session too.
func TestOutputWithoutStore(t *testing.T) {
	var full atomic.Bool
	s := newSite(t, func(c *Config) {
		c.Store = store.Fault(c.Store, func(c store.Call) store.Failure {
			if c.Op == store.OpCommit && full.Load() {
				return store.Unavailable
			}
			return store.Works
		})
	})
	follow := s.follow(t, "submit -- true")
	p := s.peer(t, "gpu1")
	_, offer := p.join(nil)
	full.Store(true)
	defer full.Store(false)
	if _, stderr, status := s.say(t, "bob", "submit -- true", nil); status != job.ExitTryLater {
		t.Fatalf("a submit that cannot be saved: %d, %s", status, stderr)
	}
	k := p.attempt(offer.Lease)
	k.want("have 0")
	k.send(job.Out, "live")
	bell := s.spools.Follow(offer.Job)
	defer bell.Close()
	if c, err := bell.Next(t.Context()); err != nil || string(c.Data) != "live" {
		t.Fatalf("output = %q, %v", c.Data, err)
	}
	full.Store(false)
	k.send(job.Final, `{"reason":"exit"}`)
	k.want("done")
	if _, _, status := follow(); status != 0 {
		t.Errorf("the job ended with %d", status)
	}
}
