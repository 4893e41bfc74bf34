package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/charmbracelet/log"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/sshd"
	"github.com/rai-project/raid/sshd/backup"
	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

func serveCommand() *cobra.Command {
	var path, state, listen string
	cmd := &cobra.Command{
		Use:   "serve --state DIR --listen ADDR [--config raid.toml]",
		Short: "serve SSH, keep the queue, run the local runners",
		Example: "  raid serve --state /var/lib/raid --listen :2222\n" +
			"  raid serve --state /tmp/raid --listen 127.0.0.1:0     # try it; port 0 picks one",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readConfig(path)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("state") {
				c.State = state
			}
			if cmd.Flags().Changed("listen") {
				c.Listen = listen
			}
			return serve(cmd.Context(), c)
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "raid.toml")
	cmd.Flags().StringVar(&state, "state", "/var/lib/raid", "the state folder")
	cmd.Flags().StringVar(&listen, "listen", ":2222", "where to listen")
	return cmd
}

// jobsView lets staff ask the database in SQL: SELECT * FROM jobs.
var jobsView = store.View{Name: "jobs", Tables: []string{queue.TableJob, queue.TablePast},
	Columns: []string{"id", "state", "reason", "exit", "user", "team", "pool", "kind", "name", "runner", "attempt",
		"queued_at", "started_at", "finished_at", "queue_wait_ms", "run_ms", "charged_s", "source_sha256", "expired"}}

// goodbye is how long sessions have to end when raid is told to stop.
const goodbye = 5 * time.Second

// serve runs raid until SIGTERM or SIGINT.
func serve(ctx context.Context, c config) error {
	ctx, signals := onSignals(ctx)
	defer signals.stop()
	state, err := openState(c.State)
	if err != nil {
		return err
	}
	if err := c.reveal(state.dir); err != nil {
		return err
	}
	h := house{config: c, state: state, signals: signals, log: newLogger(c.Log.Level)}
	if c.Queue.Store == "sqlite" {
		return h.alone(ctx)
	}
	return h.among(ctx)
}

// A house is one raid serve.
type house struct {
	config
	state   *state
	signals signalBox
	log     *log.Logger
}

// alone serves with a database in the state folder.
func (h *house) alone(ctx context.Context) error {
	st, err := store.OpenSQLite(ctx, h.state.dir, h.log.Errorf, jobsView)
	if err != nil {
		return inUse(err, h.state.dir)
	}
	defer st.Close()
	if err := h.state.sweep(); err != nil {
		return err
	}
	srv, err := h.server(ctx, st, nil)
	if err != nil {
		return err
	}
	l, err := h.listen(ctx)
	if err != nil {
		return err
	}
	return h.open(ctx, l, srv, func(ctx context.Context) ([]slot, error) {
		if err := srv.Welcome(ctx); err != nil {
			return nil, err
		}
		slots, err := prepareSlots(ctx, h.config, h.state, srv, l.Addr(), "local", h.log)
		if err == nil {
			h.ready(l.Addr())
		}
		return slots, err
	})
}

// A service is an sshd.Server and what speaks HTTP beside it.
type service struct {
	*sshd.Server
	house *house
	http  net.Listener // nil for none
}

// server makes what serves people and runners from a store. more, which may be nil, adds
// to what it is made from.
func (h *house) server(ctx context.Context, st store.Store, more func(*sshd.Config)) (*service, error) {
	if err := backup.Whole(ctx, st); err != nil {
		return nil, cli.Hintf(err, "empty it and migrate again, or use the store that it came from")
	}
	hl, http, err := h.HTTP.open(ctx, filepath.Join(h.state.dir, "host_key"))
	if err != nil {
		return nil, err
	}
	c := sshd.Config{
		OpenBlobs: h.Blobs.open(h.state.dir, h.Queue.Store == "sqlite", h.state.host.PublicKey(), h.log), HTTP: http,
		Dir: h.state.dir, HostKeys: []ssh.Signer{h.state.host}, Store: st, Policy: h.policy(),
		Pools: h.pools(runtime.GOARCH), Rules: h.asks(), Limits: h.limits(), Guests: h.Auth.Guests, Reserve: float64(h.Limits.Reserve),
		Keep: h.keep(), Database: h.Queue.file(h.state.dir),
		Mirror: h.mirror(h.log.Warnf), Version: version(), Log: h.log,
	}
	if more != nil {
		more(&c)
	}
	srv, err := sshd.New(ctx, c)
	if err != nil && hl != nil {
		hl.Close()
	}
	if errors.Is(err, sshd.ErrLostStore) {
		return nil, cli.Hintf(err, "put %s back from a backup, or remove %s and %s to begin anew", cmp.Or(h.Queue.file(""), "what was in Redis"),
			filepath.Join(h.state.dir, "spool"), filepath.Join(h.state.dir, "blobs"))
	}
	return &service{srv, h, hl}, err
}

// Serve is sshd.Server's, with HTTP.
func (s *service) Serve(ctx context.Context, l net.Listener, grace time.Duration) error {
	return s.beside(ctx, func() error { return s.Server.Serve(ctx, l, grace) })
}

// Run is sshd.Server's, with HTTP.
func (s *service) Run(ctx context.Context) error {
	return s.beside(ctx, func() error { return s.Server.Run(ctx) })
}

// beside speaks HTTP while fn runs.
func (s *service) beside(ctx context.Context, fn func() error) error {
	if s.http == nil {
		return fn()
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { reportHTTP(s.ServeHTTP(ctx, s.http, goodbye), s.house.log) })
	return fn()
}

// Welcome enrols the first admin.
func (s *service) Welcome(ctx context.Context) error { return s.house.state.welcome(ctx, s.Server) }

// A front answers connections: a whole raid.
type front interface {
	Serve(ctx context.Context, l net.Listener, grace time.Duration) error
}

// open serves until ctx ends, and keeps the local runners that prepare makes ready.
func (h *house) open(ctx context.Context, l net.Listener, f front, prepare func(context.Context) ([]slot, error)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	served := make(chan error, 1)
	wg.Go(func() {
		err := f.Serve(inner, l, goodbye)
		stop(err)
		served <- err
	})
	slots, err := prepare(inner)
	if err != nil {
		return err
	}
	keepSlots(inner, slots, h.signals, h.log)
	return <-served
}

func (h *house) listen(ctx context.Context) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", h.Listen)
	if err != nil {
		return nil, cli.Hintf(err, "choose another address with --listen")
	}
	return l, nil
}

// ready says that clients may come.
func (h *house) ready(addr net.Addr) {
	fmt.Fprintf(os.Stderr, "raid: host key %s\n", ssh.FingerprintSHA256(h.state.host.PublicKey()))
	fmt.Fprintf(os.Stderr, "raid: listening on %s\n", addr)
}

func newLogger(level string) *log.Logger {
	l, err := log.ParseLevel(level)
	if err != nil {
		l = log.InfoLevel
	}
	return log.NewWithOptions(os.Stderr, log.Options{ReportTimestamp: true, Level: l, Prefix: "raid"})
}

// A signalBox ends a context at the first SIGTERM or SIGINT and tells of the second.
type signalBox struct {
	stop   func()
	second <-chan struct{} // closed at the second signal
}

// Signals by which raid tells its runners to go. They say what is wanted, however often
// they come: raid may be stopped many times while one job runs.
const (
	goLater = syscall.SIGUSR1 // when the job is over
	goNow   = syscall.SIGUSR2 // the job is given back
)

// onSignals heeds SIGTERM, SIGINT and more of the two above.
func onSignals(ctx context.Context, more ...os.Signal) (context.Context, signalBox) {
	ctx, cancel := context.WithCancelCause(ctx)
	in, second, done := make(chan os.Signal, 4), make(chan struct{}), make(chan struct{})
	signal.Notify(in, append(more, syscall.SIGTERM, syscall.SIGINT)...)
	var wg sync.WaitGroup
	wg.Go(func() {
		for asked := false; ; {
			select {
			case s := <-in:
				cancel(fmt.Errorf("%s", s))
				if s == goNow || asked && s != goLater {
					close(second)
					return
				}
				asked = asked || s != goLater
			case <-done:
				return
			}
		}
	})
	return ctx, signalBox{second: second, stop: func() { signal.Stop(in); close(done); wg.Wait(); cancel(nil) }}
}

// A state is the state folder with the keys in it.
type state struct {
	dir   string
	host  ssh.Signer
	admin string // the admin's public key
}

// openState opens the folder and makes what a first start needs.
func openState(dir string) (*state, error) {
	dir, err := absolute(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm()&0o077 != 0 {
		if err != nil {
			return nil, err
		}
		return nil, cli.Hintf(fmt.Errorf("others can look into %s", dir), "it holds private keys: chmod 700 %s", dir)
	}
	s := &state{dir: dir}
	if _, err := ensureKey(filepath.Join(dir, "host_key"), "raid host key"); err != nil {
		return nil, err
	}
	if s.host, err = keys.LoadSigner(filepath.Join(dir, "host_key"), nil); err != nil {
		return nil, err
	}
	s.admin, err = ensureKey(filepath.Join(dir, "admin"), "raid admin")
	return s, err
}

// sweep removes what a raid that was killed had half written. The caller holds the
// folder's lock. A runner without an id may be writing just that.
func (s *state) sweep() error {
	ids, err := filepath.Glob(filepath.Join(s.dir, "runners", "*", "id"))
	err = errors.Join(err, keys.Sweep(s.dir))
	for _, id := range ids {
		err = errors.Join(err, keys.Sweep(filepath.Dir(id)))
	}
	return err
}

// ensureKey makes a key unless it is there, and returns its public line.
func ensureKey(path, comment string) (string, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		private, public, err := keys.NewKey(comment)
		if err != nil {
			return "", err
		}
		if err := keys.WriteKey(path, private, public); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	line, err := os.ReadFile(path + ".pub")
	if errors.Is(err, fs.ErrNotExist) { // whoever made the key was killed before it had written both files
		line, err = publish(path, comment)
	}
	return strings.TrimSpace(string(line)), err
}

// publish writes the public half of a key and returns it.
func publish(path, comment string) ([]byte, error) {
	signer, err := keys.LoadSigner(path, nil)
	if err != nil {
		return nil, err
	}
	line := bytes.TrimSpace(ssh.MarshalAuthorizedKey(signer.PublicKey()))
	line = append(line, " "+comment+"\n"...)
	return line, keys.WriteFile(path+".pub", line, 0o644)
}

// welcome enrols the first admin. The key counts from loopback only: whoever copies
// it out of a backup has still not come in.
func (s *state) welcome(ctx context.Context, srv *sshd.Server) error {
	if srv.Enrolled(s.admin) {
		return nil
	}
	_, _, err := srv.Enrol(ctx, keys.Enrollment{User: "admin", Role: keys.Admin, Key: s.admin, LoopbackOnly: true}, "raid serve")
	if err == nil {
		fmt.Fprintf(os.Stderr, "raid: made the admin key %s; it counts from this machine only\n", filepath.Join(s.dir, "admin"))
	}
	return err
}
