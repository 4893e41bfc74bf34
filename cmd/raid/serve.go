package main

import (
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
		"queued_at", "started_at", "finished_at", "queue_wait_ms", "run_ms", "charged_s", "source_sha256"}}

// goodbye is how long sessions have to end when raid is told to stop.
const goodbye = 5 * time.Second

// serve runs raid until SIGTERM or SIGINT.
func serve(ctx context.Context, c config) error {
	ctx, signals := onSignals(ctx)
	defer signals.stop()
	logger := newLogger(c.Log.Level)
	state, err := openState(c.State)
	if err != nil {
		return err
	}
	if err := c.reveal(state.dir); err != nil {
		return err
	}
	st, err := store.OpenSQLite(ctx, state.dir, jobsView)
	if errors.Is(err, store.ErrLocked) {
		return cli.Hintf(fmt.Errorf("another raid uses %s: %w", state.dir, err), "stop it first, or give this one a folder of its own with --state")
	}
	if err != nil {
		return err
	}
	defer st.Close()
	srv, err := sshd.New(ctx, sshd.Config{
		Dir: state.dir, HostKeys: []ssh.Signer{state.host}, Store: st, Policy: c.policy(),
		Pools: c.pools(runtime.GOARCH), Limits: c.limits(), Guests: c.Auth.Guests, Reserve: float64(c.Limits.Reserve),
		Mirror: c.mirror(logger.Warnf), Version: version(), Log: logger,
	})
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", c.Listen)
	if err != nil {
		return cli.Hintf(err, "choose another address with --listen")
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	served := make(chan error, 1)
	wg.Go(func() {
		err := srv.Serve(inner, l, goodbye)
		stop(err)
		served <- err
	})
	if err := state.welcome(inner, srv); err != nil {
		return err
	}
	slots, err := prepareSlots(inner, c, state, srv, l.Addr())
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "raid: host key %s\n", ssh.FingerprintSHA256(state.host.PublicKey()))
	fmt.Fprintf(os.Stderr, "raid: listening on %s\n", l.Addr())
	keepSlots(inner, slots, signals, logger)
	return <-served
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

func onSignals(ctx context.Context) (context.Context, signalBox) {
	ctx, cancel := context.WithCancelCause(ctx)
	in, second, done := make(chan os.Signal, 2), make(chan struct{}), make(chan struct{})
	signal.Notify(in, syscall.SIGTERM, syscall.SIGINT)
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; n < 2; n++ {
			select {
			case s := <-in:
				if n == 0 {
					cancel(fmt.Errorf("%s", s))
				} else {
					close(second)
				}
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

// ensureKey makes a key unless it is there, and returns its public line.
func ensureKey(path, comment string) (string, error) {
	private, public, err := keys.NewKey(comment)
	if err != nil {
		return "", err
	}
	if err := keys.WriteKey(path, private, public); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	line, err := os.ReadFile(path + ".pub")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(line)), nil
}

// welcome enrols the first admin. The key counts from loopback only: whoever copies
// it out of a backup has still not come in.
func (s *state) welcome(ctx context.Context, srv *sshd.Server) error {
	if srv.Enrolled(s.admin) {
		return nil
	}
	_, _, err := srv.Enrol(ctx, keys.Enrollment{User: "admin", Role: keys.Admin, Key: s.admin}, "raid serve", true)
	if err == nil {
		fmt.Fprintf(os.Stderr, "raid: made the admin key %s; it counts from this machine only\n", filepath.Join(s.dir, "admin"))
	}
	return err
}
