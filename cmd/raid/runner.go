package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/gpu"
)

// runnerFlags are those of `raid runner`; the short ones are RAI's.
type runnerFlags struct {
	state, server, identity, knownHosts, name, config, secret string
	pools, gpus                                               []string
	verbose, debug                                            bool
}

func runnerCommand() *cobra.Command {
	var f runnerFlags
	cmd := &cobra.Command{
		Use:   "runner --state DIR [--server rai@host:port -i KEY --known-hosts FILE]",
		Short: "run jobs: one runner, one slot",
		Long: "A runner takes jobs from raid and runs them in boxes. A local one is started by `raid serve`\n" +
			"and finds all it needs in its state folder; elsewhere it is told where raid is.",
		Example: "  raid runner --state /var/lib/raid/runners/0\n" +
			"  raid runner --state /var/lib/raid-runner --server rai@raid.example.edu:2222 -i runner-gpu1 --known-hosts known_hosts",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRunner(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.state, "state", "", "the runner's own folder")
	fl.StringVar(&f.server, "server", "", "where raid is: rai@host:port")
	fl.StringVarP(&f.identity, "identity", "i", "", "the runner's private key")
	fl.StringVar(&f.knownHosts, "known-hosts", "", "a file that holds raid's host key")
	fl.StringVar(&f.name, "name", "", "what users see; the host's name by default")
	fl.StringVar(&f.config, "config", "", "raid.toml, for [box], [limits] and [runners]")
	fl.StringSliceVarP(&f.pools, "queue", "q", nil, "the pools to serve")
	fl.StringSliceVar(&f.gpus, "gpu", nil, "the GPUs it owns, by index or UUID; all of the machine's by default")
	fl.StringVarP(&f.secret, "secret", "s", "", "accepted as in RAI; it has no meaning here")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "say more")
	fl.BoolVarP(&f.debug, "debug", "d", false, "say everything")
	cmd.MarkFlagRequired("state")
	return cmd
}

// runRunner runs one runner until SIGTERM; a second one gives its job back.
func runRunner(ctx context.Context, f runnerFlags) error {
	dir, err := absolute(f.state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	first, signals := onSignals(ctx) // from here on nothing is left half made by a signal
	defer signals.stop()
	lock, err := lockSlot(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	slot, err := f.slot(dir)
	if err != nil {
		return err
	}
	level := "info"
	if f.debug || f.verbose {
		level = "debug"
	}
	logger := newLogger(level).With("runner", slot.Name)
	gpus, err := ownGPUs(first, slot)
	if err != nil {
		return err
	}
	engine, err := newEngine(first, dir, slot, logger.Warnf)
	if err != nil && first.Err() != nil {
		return nil // told to go before there was anything to do
	}
	if err != nil {
		return err
	}
	if w := engine.Weakness(); w != "" {
		logger.Warn("weaker than a container", "engine", engine.Name(), "what", w)
	}
	r := runner.New(runner.Config{Dir: dir, Name: slot.Name, Pools: slot.Pools, Arch: runtime.GOARCH, Engine: engine,
		GPUs: gpus, Limits: slot.Config.Limits, Orphan: slot.Config.Orphan, Warm: slot.Config.Warm, Express: slot.Express, Local: f.server == "", Logf: logger.Infof,
		Dial: func(ctx context.Context) (*dial.Client, error) { return f.dial(ctx, dir) }})
	defer context.AfterFunc(first, r.Drain)()
	killable, kill := context.WithCancelCause(ctx)
	defer kill(nil)
	go func() { // ends with the second signal or this process
		<-signals.second
		kill(errors.New("second signal"))
	}()
	logger.Info("ready", "engine", engine.Name(), "gpus", len(gpus), "pools", strings.Join(slot.Pools, ","))
	return r.Run(killable)
}

// lockSlot takes the folder; its holder is told by the process id in the file.
func lockSlot(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another runner uses %s", dir)
		}
		return nil, err
	}
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return f, err
}

// slot is slot.json for a local runner, and made from flags for another.
func (f *runnerFlags) slot(dir string) (slotFile, error) {
	if f.server == "" {
		s, err := readSlot(dir)
		if err != nil {
			return s, cli.Hintf(err, "a runner that no raid serve prepared needs --server, -i and --known-hosts")
		}
		if len(f.pools) > 0 {
			s.Pools = f.pools
		}
		return s, nil
	}
	c, err := readConfig(f.config)
	if err != nil {
		return slotFile{}, err
	}
	s := slotFile{Name: f.name, Server: f.server, Pools: f.pools, GPUs: f.gpus, Config: c.rules()}
	if s.Name == "" {
		if s.Name, err = os.Hostname(); err != nil {
			return s, err
		}
	}
	if len(s.Pools) == 0 {
		s.Pools = c.pools(runtime.GOARCH)
	}
	return s, nil
}

func readSlot(dir string) (s slotFile, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "slot.json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// dial connects to raid. A local runner looks the address up every time.
func (f *runnerFlags) dial(ctx context.Context, dir string) (*dial.Client, error) {
	server, identity, hostKeys, known := f.server, f.identity, []string(nil), []string(nil)
	if server == "" {
		s, err := readSlot(dir)
		if err != nil {
			return nil, err
		}
		server, identity, hostKeys = s.Server, filepath.Join(dir, "key"), []string{s.HostKey}
	} else {
		known = []string{f.knownHosts}
	}
	t, err := dial.Parse(server)
	if err != nil {
		return nil, err
	}
	signer, err := keys.LoadSigner(identity, nil)
	if err != nil {
		return nil, err
	}
	t.Signers, t.HostKeys, t.KnownHosts = []ssh.Signer{signer}, hostKeys, known
	return dial.Dial(ctx, t)
}

// ownGPUs returns the GPUs of this slot: those slot.json names, or all of them.
func ownGPUs(ctx context.Context, s slotFile) ([]gpu.Device, error) {
	all, err := gpu.Find(ctx)
	if err != nil {
		return nil, err
	}
	if s.HostKey == "" && len(s.GPUs) == 0 { // not a local slot: the runner has the machine to itself
		return all, nil
	}
	mine := slices.DeleteFunc(all, func(d gpu.Device) bool {
		return !slices.Contains(s.GPUs, d.UUID) && !slices.Contains(s.GPUs, strconv.Itoa(d.Index))
	})
	if len(mine) < len(s.GPUs) {
		return nil, fmt.Errorf("of the GPUs %s only %d are there", strings.Join(s.GPUs, ", "), len(mine))
	}
	return mine, nil
}

// newEngine makes the engine that raid.toml chose. Its id is the runner's own and
// stays, so that a later process finds what an earlier one left.
func newEngine(ctx context.Context, dir string, s slotFile, logf func(string, ...any)) (box.Engine, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	id, err := runnerID(dir)
	if err != nil {
		return nil, err
	}
	return bwrap.New(ctx, bwrap.Config{ID: id, Exe: exe, Args: []string{"shim"}, Images: s.Config.Images, Logf: logf})
}

func runnerID(dir string) (string, error) {
	path := filepath.Join(dir, "id")
	b, err := os.ReadFile(path)
	if err == nil {
		return strings.TrimSpace(string(b)), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	id := uuid.NewString()
	return id, keys.WriteFile(path, []byte(id+"\n"), 0o600)
}
