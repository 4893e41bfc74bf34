package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/redistest"
)

const patience = 30 * time.Second

// A town is several raids of one deployment.
type town struct {
	t     *testing.T
	redis *redistest.Server
	host  ssh.Signer
	ada   ssh.Signer // the only one who is enrolled
	raids []*house
}

// A house is one raid, whose leader says which one it is.
type house struct {
	t    *testing.T
	town *town
	name string
	addr string
	own  ssh.Signer
	stop func() // and wait
	raid *Raid

	mu    sync.Mutex // guards the following
	terms int
	fail  chan error  // ends a term
	redis chan string // "away" and "back", as it says of Redis
}

func newTown(t *testing.T, n int) *town {
	tn := &town{t: t, redis: redistest.Start(t), host: dialtest.Signer(t), ada: dialtest.Signer(t)}
	for range n {
		tn.build()
	}
	return tn
}

func (tn *town) build() *house {
	tn.t.Helper()
	h := &house{t: tn.t, town: tn, name: fmt.Sprint("raid", len(tn.raids)), own: dialtest.Signer(tn.t), fail: make(chan error), redis: make(chan string, 16)}
	redis, err := store.OpenRedis(tn.t.Context(), store.RedisOptions{URL: tn.redis.URL()})
	if err != nil {
		tn.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tn.t.Fatal(err)
	}
	h.addr = l.Addr().String()
	h.raid, err = New(Config{HostKeys: []ssh.Signer{tn.host}, Own: h.own, Addr: h.addr, Version: h.name, Redis: redis,
		Lead: h.lead, Forget: func() error { return nil }, Others: func([]store.Member) {}, Logf: h.logf})
	if err != nil {
		tn.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- h.raid.Serve(ctx, l, time.Second) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			tn.t.Errorf("Serve of %s = %v", h.name, err)
		}
		redis.Close()
	})
	tn.t.Cleanup(h.stop)
	tn.raids = append(tn.raids, h)
	return h
}

func (h *house) logf(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, word := range []string{"away", "back"} {
		if strings.HasPrefix(format, "Redis is "+word) {
			h.redis <- word
		}
	}
	h.t.Logf("%s: "+format, append([]any{h.name}, args...)...)
}

func (h *house) lead(context.Context) (Leader, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.terms++
	return h, nil
}

func (h *house) led() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.terms
}

// Authorize implements Leader.
func (h *house) Authorize(_ context.Context, key ssh.PublicKey, _ netip.AddrPort) (keys.Identity, error) {
	if string(key.Marshal()) == string(h.town.ada.PublicKey().Marshal()) {
		return keys.Identity{User: "ada", Role: keys.Student}, nil
	}
	return keys.Identity{Role: keys.Guest}, nil
}

// Handle implements Leader: "who" says who handles it and for whom, "wait" waits for its end.
func (h *house) Handle(ctx context.Context, s *door.Session) int {
	fmt.Fprintln(s, h.name, s.Who.User, s.Who.Role)
	if s.Command == "wait" {
		<-ctx.Done()
		fmt.Fprintln(s.Stderr(), context.Cause(ctx))
		return 7
	}
	return 0
}

// Welcome implements Leader.
func (h *house) Welcome(context.Context) error { return nil }

// Run implements Leader.
func (h *house) Run(ctx context.Context) error {
	select {
	case err := <-h.fail:
		return err
	case <-ctx.Done():
		return nil
	}
}

// leader waits until all raids that are up send sessions to one of them, and returns it.
func (tn *town) leader(up ...*house) *house {
	tn.t.Helper()
	if len(up) == 0 {
		up = tn.raids
	}
	ctx, cancel := context.WithTimeout(tn.t.Context(), patience)
	defer cancel()
	for {
		said := map[string]bool{}
		for _, h := range up {
			out, err := h.ask(tn.ada, "who")
			if err != nil {
				out = ""
			}
			said[out] = true
		}
		if len(said) == 1 && !said[""] {
			for out := range said {
				name, rest, _ := strings.Cut(strings.TrimSpace(out), " ")
				if rest != "ada student" {
					tn.t.Fatalf("sessions are handled as %q", out)
				}
				return tn.raids[slices.IndexFunc(tn.raids, func(h *house) bool { return h.name == name })]
			}
		}
		select {
		case <-ctx.Done():
			tn.t.Fatalf("no raid leads all: %v", said)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (h *house) dial(key ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", h.addr, &ssh.ClientConfig{User: "rai", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.FixedHostKey(h.town.host.PublicKey()), Timeout: patience})
}

func (h *house) ask(key ssh.Signer, command string) (string, error) {
	c, err := h.dial(key)
	if err != nil {
		return "", err
	}
	defer c.Close()
	s, err := c.NewSession()
	if err != nil {
		return "", err
	}
	out, err := s.Output(command)
	return string(out), err
}

// waiter starts a session that lasts until somebody ends it, and returns its end: the exit
// status and what was said on stderr.
func (h *house) waiter() func() (int, string) {
	h.t.Helper()
	c, err := h.dial(h.town.ada)
	if err != nil {
		h.t.Fatal(err)
	}
	s, err := c.NewSession()
	if err != nil {
		h.t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	var errs strings.Builder
	s.Stderr = &errs
	if err := s.Start("wait"); err != nil {
		h.t.Fatal(err)
	}
	out.Read(make([]byte, 100)) // it runs
	return func() (int, string) {
		defer c.Close()
		late := time.AfterFunc(patience, func() { c.Close() })
		defer late.Stop()
		err := s.Wait()
		var exit *ssh.ExitError
		if errors.As(err, &exit) {
			return exit.ExitStatus(), errs.String()
		}
		h.t.Errorf("a session ended with %v", err)
		return -1, errs.String()
	}
}

// One raid leads, the others are doors to it; when it stops, another one leads at once.
func TestOneLeads(t *testing.T) {
	tn := newTown(t, 3)
	first := tn.leader()
	if first.led() != 1 {
		t.Errorf("the leader has led %d times, want once", first.led())
	}
	rest := slices.DeleteFunc(slices.Clone(tn.raids), func(h *house) bool { return h == first })
	end := rest[0].waiter()
	first.stop()
	if status, said := end(); status != 7 || !strings.Contains(said, door.ErrShutdown.Error()) {
		t.Errorf("a session through another door ended with %d, %q, want the handler's own 7 and why", status, said)
	}
	if second := tn.leader(rest...); second == first {
		t.Error("a raid that has stopped leads")
	}
}

// Raids tell each other what they run.
func TestVersions(t *testing.T) {
	tn := newTown(t, 2)
	tn.leader()
	for i, h := range tn.raids {
		other := tn.raids[1-i]
		all, err := h.raid.meet(t.Context())
		if err != nil || len(all) != 1 || all[0].Addr != other.addr || all[0].Version != other.name {
			t.Errorf("%s knows %+v, %v, want only %s, which runs that", h.name, all, err, other.name)
		}
	}
}

// A raid that cannot lead leaves it to others, and its sessions are told.
func TestDeposed(t *testing.T) {
	tn := newTown(t, 2)
	first := tn.leader()
	end := first.waiter()
	first.fail <- errors.New("the test wants it")
	if status, said := end(); status != 7 || !strings.Contains(said, store.ErrDeposed.Error()) {
		t.Errorf("a session of the old leader ended with %d, %q, want 7 and why", status, said)
	}
	tn.leader()
	if n := tn.raids[0].led() + tn.raids[1].led(); n < 2 {
		t.Errorf("there were %d terms, want another one", n)
	}
}

// A Redis that is away for less than limbo ends no term, and while it is away for longer
// no raid leads: whoever comes is told so.
func TestRedisAway(t *testing.T) {
	tn := newTown(t, 1)
	h := tn.leader()
	end := h.waiter()
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-h.redis:
			if got != want {
				t.Fatalf("Redis is %s, want %s", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("the raid does not say that Redis is %s", want)
		}
	}
	tn.redis.Signal(syscall.SIGSTOP)
	expect("away")
	tn.redis.Signal(syscall.SIGCONT)
	expect("back")
	tn.redis.Kill() // in that moment
	expect("away")
	tn.redis.Restart()
	expect("back")
	if h.led() != 1 {
		t.Errorf("there were %d terms, want one", h.led())
	}
	tn.redis.Kill()
	if status, said := end(); status != 7 || !strings.Contains(said, store.ErrDeposed.Error()) {
		t.Errorf("the session ended with %d, %q, want 7 and why", status, said)
	}
	_, err := h.ask(tn.ada, "who")
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 75 {
		t.Errorf("a session while no raid leads ended with %v, want status 75", err)
	}
	tn.redis.Restart()
	tn.leader()
}

// Whoever is no raid of the deployment cannot speak for others, whatever it has.
func TestStrangerIsNoDoor(t *testing.T) {
	tn := newTown(t, 1)
	h := tn.leader()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, key := range []ssh.Signer{dialtest.Signer(t), tn.ada} {
		if link, err := door.Dial(ctx, h.addr, key, tn.host.PublicKey()); err == nil {
			t.Error("a stranger has a link to the leader")
			link.Close()
		}
	}
}
