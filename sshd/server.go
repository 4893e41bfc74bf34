// Package sshd is raid's service: everything a verified SSH session may ask for.
//
// A [Server] joins the parts: door (hardened connections), brain (the queue and its
// store), stream (output), blob (uploads and archives), janitor (how long they stay) and
// keys (who someone is).
// All it does is offered as commands of one table, to people and runners alike; the
// help, the access control and the documentation are made from that table.
//
// Promises: a command answers a stranger's job exactly as one that does not exist;
// an upload is accepted whole or leaves nothing; whatever is acknowledged is durable
// first; a slow reader slows nobody. Non-goals: running jobs (package runner does)
// and reading configuration (cmd/raid does).
package sshd

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/janitor"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/stream"
	"github.com/rai-project/raid/sshd/web"
)

// Limits are what one submission may use.
type Limits struct {
	job.Limits
	Upload   int64 // bytes on the wire
	Unpacked int64 // bytes after expansion
	Entries  int
	GPUs     int  // most GPUs of one job; 0: as many as a slot has
	Network  bool // may ask for a network

	BuildImage bool // may have an image built
	Push       bool // may have it pushed
}

// Rules are what a pool asks of the jobs in it.
type Rules struct {
	Engine     string // only runners that make boxes with it take them; "" for any
	KeepGoing  bool   // later steps run after one failed, as RAI did
	StrictArch bool   // the architecture of a GPU in a build file is no wish
}

// Config says what a server is. Dir, HostKeys, Store, Policy, Pools, Limits and Log
// are required.
type Config struct {
	Dir      string // the state folder; the caller holds its lock and the store in it
	Stale    bool   // another raid has served since Dir was last used: what is unfinished in it does not count
	HostKeys []ssh.Signer
	Store    store.Store
	Policy   queue.Policy
	Pools    []string              // the first is the default
	Rules    map[string]Rules      // of pools that have some
	Limits   map[keys.Role]Limits  // for each role; keys.Student is everybody else's
	Guests   bool                  // unknown keys may look around
	Reserve  float64               // share of the disk that uploads leave free
	Keep     Keep                  // how long what jobs leave behind stays
	HTTP     *HTTP                 // nil: raid speaks SSH only
	Database string                // the store's file, if it is one: its size is told to staff
	Mirror   *stream.MirrorOptions // nil: no mirror
	// Raids returns the raids of the deployment; nil if this is the only one.
	Raids   func(context.Context) ([]Raid, error)
	Version Version
	Log     *log.Logger

	// OpenBlobs opens where uploads and outputs are. Defaults to the folder "blobs" in Dir.
	OpenBlobs func(blob.Options) (blob.Store, error)
}

// HTTP says how links are made. The listener is the caller's: see [Server.ServeHTTP].
type HTTP struct {
	Secret []byte // of [web.Secret]
	Base   string // what URLs begin with
}

// A Raid is one raid of a deployment.
type Raid struct {
	Addr    string `json:"addr"` // where the others reach it
	Leads   bool   `json:"leads"`
	Version string `json:"version"` // what it runs; "" if it does not say
}

// A Version says which raid this is.
type Version struct {
	Version   string `json:"version"`
	Commit    string `json:"commit,omitempty"`
	BuildTime string `json:"build_time,omitempty"`
	Go        string `json:"go"`
}

// A Server is one running raid. Its methods are safe for concurrent use.
type Server struct {
	Config
	brain     *brain.Brain
	spools    *stream.Spools
	blobs     blob.Store
	web       *web.Server    // nil without HTTP
	mirror    *stream.Mirror // nil without one
	janitor   *janitor.Janitor
	book      keys.Book
	admit     sync.Mutex // held from a Check of the book to its Apply
	since     time.Time
	secret    []byte   // makes aliases
	waitlists sync.Map // pool → *waitlist
	locals    sync.Map // fingerprint of a local runner's key → its state folder

	intaking sync.Mutex // guards intakes
	intakes  map[job.Lease]*intake
	ended    ended
	unkept   ended // whose output may have to be kept yet; see keepLogs
	fetching turns // output that is being fetched
}

// Tables of rows that are not the queue's.
const (
	tableUser = "user"
	tableKey  = "key"
)

// New loads the state. Nothing listens before Serve.
func New(ctx context.Context, c Config) (*Server, error) {
	s := &Server{Config: c, since: time.Now()}
	if err := s.loadPeople(ctx); err != nil {
		return nil, err
	}
	var err error
	if err := s.openBlobs(); err != nil {
		return nil, err
	}
	s.spools = stream.New(filepath.Join(c.Dir, "spool"), c.Log.Errorf)
	if c.Stale {
		if err := Forget(c.Dir); err != nil {
			return nil, err
		}
	}
	if c.Mirror != nil {
		if s.mirror, err = stream.NewMirror(*c.Mirror, s.spools); err != nil {
			return nil, err
		}
	}
	s.brain, err = brain.New(ctx, brain.Config{Store: c.Store, Policy: c.Policy, Logf: c.Log.Errorf, Changed: s.changed})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.dropIncoming(), s.dropStrays()); err != nil {
		return nil, err
	}
	s.janitor = s.newJanitor()
	s.secret = aliasSecret(c.HostKeys[0])
	return s, nil
}

// Forget removes what jobs that had not ended have left in a state folder that no Server
// uses: another raid has gone on with them.
func Forget(dir string) error {
	spools := stream.New(filepath.Join(dir, "spool"), func(string, ...any) {})
	return errors.Join(spools.RemoveUnfinished(), spools.Close(), os.RemoveAll(filepath.Join(dir, "incoming")))
}

// Serve answers connections on l until ctx ends, then says goodbye to the sessions
// and stops within grace. It returns nil after an orderly end. l is closed. It is Run
// behind a door of its own.
func (s *Server) Serve(ctx context.Context, l net.Listener, grace time.Duration) error {
	front, err := door.New(door.Config{HostKeys: s.HostKeys, Authorize: s.Authorize, Handle: s.Handle, Logf: s.Log.Infof})
	if err != nil {
		l.Close()
		return err
	}
	inner, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(inner); err != nil {
			stop(err)
		}
	})
	shut := func() {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		front.Shutdown(limit) // returns when every session has ended
	}
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-inner.Done():
		}
		shut()
	})
	err = front.Serve(l)
	if cause := context.Cause(inner); cause != nil {
		err = cause
	}
	if ctx.Err() == nil && !errors.Is(err, door.ErrClosed) {
		stop(err)
	}
	shut()
	stop(nil)
	wg.Wait()
	if errors.Is(err, door.ErrClosed) {
		return nil
	}
	return err
}

// Run does all that happens behind the door, until ctx ends: it is called once, and the
// Server is used up then. Sessions need it; they have ended before ctx does. The error
// is that of the store, when somebody else writes to it.
func (s *Server) Run(ctx context.Context) error {
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		if failed = s.brain.Run(inner); failed != nil {
			s.Log.Error("the queue has stopped", "err", failed)
			stop(failed)
		}
	})
	if s.mirror != nil {
		wg.Go(func() { s.mirror.Run(inner) })
		for _, rec := range s.brain.Unfinished() {
			s.mirror.Watch(rec.ID)
		}
		wg.Go(func() { s.endMirrors(inner) })
	}
	wg.Go(func() { s.endOutput(inner) })
	wg.Go(func() { s.keepLogs(inner) })
	wg.Go(func() { s.janitor.Run(inner) })
	wg.Wait()
	s.spools.Close()
	return failed
}

// ServeHTTP serves links and health on l until ctx ends. It needs Config.HTTP, and may run
// while Serve does. It returns nil after an orderly end. l is closed.
func (s *Server) ServeHTTP(ctx context.Context, l net.Listener, grace time.Duration) error {
	return s.web.Serve(ctx, l, grace)
}

// changed is told of every committed change of a job, in the brain's loop.
func (s *Server) changed(rec job.Record) {
	l := s.Log.With("job", rec.ID, "user", rec.User, "state", rec.State)
	if rec.State.Final() {
		l = l.With("reason", rec.Reason, "exit", *rec.Exit)
	}
	l.Info("job")
	if rec.State.Final() {
		s.ended.add(rec.ID)
	}
	if rec.Attempt > 1 || rec.Reason == job.ReasonInfra || rec.Reason == job.ReasonCancelled {
		s.dropAttempts(&rec)
	}
	if s.mirror != nil {
		s.mirror.Event(rec.Job)
		s.mirror.Watch(rec.ID)
	}
}

// ended are jobs whose output is complete, by whatever end they came to: a result, a
// cancel in the queue, a runner that was lost once too often.
type ended struct {
	mu   sync.Mutex // guards the following
	ids  []int64
	bell chan struct{} // nil, or closed at the next add
}

func (e *ended) add(id int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ids = append(e.ids, id)
	if e.bell != nil {
		close(e.bell)
		e.bell = nil
	}
}

// take returns what was added since the last call, or what to wait for.
func (e *ended) take() ([]int64, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := e.ids
	if e.ids = nil; len(ids) == 0 && e.bell == nil {
		e.bell = make(chan struct{})
	}
	return ids, e.bell
}

// endOutput tells the followers of ended jobs, until ctx ends: the brain's loop must
// not wait for a disk.
func (s *Server) endOutput(ctx context.Context) {
	for {
		ids, bell := s.ended.take()
		for _, id := range ids {
			if err := s.spools.Finish(id); err != nil {
				s.Log.Error("end the output", "job", id, "err", err)
			}
			if s.blobs.Shared() {
				s.unkept.add(id)
			}
		}
		if len(ids) > 0 {
			continue
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return
		}
	}
}

// Authorize says who a key belongs to. A key nobody enrolled is a guest's. It is
// [door.Config.Authorize].
func (s *Server) Authorize(_ context.Context, key ssh.PublicKey, from netip.AddrPort) (keys.Identity, error) {
	if id, ok := s.book.Who(key, from.Addr()); ok {
		return id, nil
	}
	if !s.Guests {
		return keys.Identity{}, errors.New("key is not enrolled")
	}
	return keys.Identity{Role: keys.Guest, Fingerprint: ssh.FingerprintSHA256(key)}, nil
}

// Enrol enters a person or a runner, durably, by raid's own right. by is for the log.
func (s *Server) Enrol(ctx context.Context, e keys.Enrollment, by string) (keys.User, keys.Key, error) {
	return s.enrol(ctx, e, by, keys.Admin)
}

// enrol is Enrol by somebody of that role. What they may is decided about the user as
// the book has it and as the book will have it, not about the words of e: Check
// trims and lowers them, so "Admin" would pass for a role that nobody knows.
func (s *Server) enrol(ctx context.Context, e keys.Enrollment, by string, role keys.Role) (keys.User, keys.Key, error) {
	s.admit.Lock()
	defer s.admit.Unlock()
	u, k, err := s.book.Check(e)
	if err != nil {
		return u, k, err
	}
	was, _ := s.book.User(u.Name)
	if !role.MayEnroll(was.Role, u.Role) {
		return u, k, &keys.RefusedError{Why: fmt.Sprintf("%s may not enrol %s", role, cmp.Or(was.Role, u.Role))}
	}
	if err := s.brain.Put(ctx, []queue.Write{row(tableUser, u.Name, u), row(tableKey, k.Fingerprint, k)}); err != nil {
		return u, k, err
	}
	s.book.Apply(u, k)
	s.Log.Info("enrolled", "user", u.Name, "role", u.Role, "team", u.Team, "key", k.Fingerprint, "by", by)
	return u, k, nil
}

// Local says that the runner with a key, in authorized_keys form, works in the state
// folder dir on this machine. Its output is then read where it is; it must be trusted
// like this process.
func (s *Server) Local(line, dir string) error {
	k, err := keys.ParseKey(line)
	if err != nil {
		return err
	}
	s.locals.Store(k.Fingerprint, dir)
	return nil
}

// Enrolled reports whether a key, in authorized_keys form, is somebody's.
func (s *Server) Enrolled(line string) bool {
	k, err := keys.ParseKey(line)
	if err != nil {
		return false
	}
	_, ok := s.book.Key(k.Fingerprint)
	return ok
}

func row(table, key string, v any) queue.Write {
	b, err := json.Marshal(v)
	if err != nil {
		panic("sshd: a row that is not JSON: " + err.Error()) // our own types; cannot happen
	}
	return queue.Write{Row: queue.Row{Table: table, Key: key, Value: b}}
}

func (s *Server) loadPeople(ctx context.Context) error {
	var users []keys.User
	var ks []keys.Key
	_, err := s.Store.Load(ctx, []string{tableUser, tableKey}, func(r queue.Row) error {
		if r.Table == tableUser {
			users = append(users, keys.User{})
			return json.Unmarshal(r.Value, &users[len(users)-1])
		}
		ks = append(ks, keys.Key{})
		return json.Unmarshal(r.Value, &ks[len(ks)-1])
	})
	if err != nil {
		return fmt.Errorf("load people: %w", err)
	}
	s.book.Load(users, ks)
	return nil
}

// limits returns what a role may use.
func (s *Server) limits(r keys.Role) Limits {
	if l, ok := s.Limits[r]; ok {
		return l
	}
	return s.Limits[keys.Student]
}

// alias is what strangers see of a tenant: always the same, and telling nothing.
func (s *Server) alias(tenant string) string {
	m := hmac.New(sha256.New, s.secret)
	m.Write([]byte(tenant))
	return "team-" + hex.EncodeToString(m.Sum(nil)[:3])
}

func aliasSecret(host ssh.Signer) []byte {
	sum := sha256.Sum256(append([]byte("raid alias "), host.PublicKey().Marshal()...))
	return sum[:]
}

// incoming is where /build of an attempt arrives, before it is a blob.
func (s *Server) incoming(l job.Lease) string {
	return filepath.Join(s.Dir, "incoming", fmt.Sprintf("%d-%d.tar", l.Job, l.Fence))
}

// dropAttempts removes what had arrived of attempts that are over, unless their own
// session has seen to it.
func (s *Server) dropAttempts(rec *job.Record) {
	files, err := filepath.Glob(filepath.Join(s.Dir, "incoming", fmt.Sprintf("%d-*.tar", rec.ID)))
	for _, f := range files {
		if rec.State.Final() || f != s.incoming(rec.Lease()) {
			err = errors.Join(err, os.Remove(f))
		}
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.Log.Error("remove what a lost attempt sent", "job", rec.ID, "err", err)
	}
}

// ErrLostStore is returned by New when there is output of jobs in the folder and a store
// that has never had a job: its file was lost, and everything would be taken for rubbish.
var ErrLostStore = errors.New("there is output of jobs here, and a database that has never had one")

// dropStrays removes output of jobs that this store, which came from a backup, does not
// have yet: their numbers will be given again, perhaps to somebody else.
func (s *Server) dropStrays() error {
	for id, err := range s.spools.List() {
		if err != nil {
			return err
		}
		if id < s.brain.Next() {
			continue
		}
		if s.brain.Next() == 1 {
			return ErrLostStore
		}
		s.Log.Warn("removed output of a job that the store does not know", "job", id)
		if err := s.spools.Remove(id); err != nil {
			return err
		}
	}
	return nil
}

// dropIncoming removes what arrived for attempts that are over.
func (s *Server) dropIncoming() error {
	dir := filepath.Join(s.Dir, "incoming")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, rec := range s.brain.Unfinished() {
		wanted[s.incoming(rec.Lease())] = true
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if !wanted[f] {
			if err := os.Remove(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// Tables are all tables of the store.
func Tables() []string {
	return append(queue.Tables(), queue.TablePast, tableUser, tableKey, janitor.Table)
}
