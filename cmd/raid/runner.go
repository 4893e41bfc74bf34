package main

import (
	"cmp"
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
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/cache"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/store"
)

// runnerFlags are those of `raid runner`; the short ones are RAI's.
type runnerFlags struct {
	state, identity, knownHosts, name, config, secret string
	servers, pools, gpus                              []string
	verbose, debug                                    bool
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
	fl.StringArrayVar(&f.servers, "server", nil, "where raid is: rai@host:port; given again, another raid of the same deployment")
	fl.StringVarP(&f.identity, "identity", "i", "", "the runner's private key")
	fl.StringVar(&f.knownHosts, "known-hosts", "", "a file that holds raid's host key")
	fl.StringVar(&f.name, "name", "", "what users see; the host's name by default")
	fl.StringVar(&f.config, "config", "", "raid.toml, for [box], [limits] and [runners]")
	fl.StringSliceVarP(&f.pools, "queue", "q", nil, "the pools to serve")
	fl.StringSliceVar(&f.gpus, "gpu", nil, "the GPUs or MIG slices it owns, by index or UUID; all of the machine's by default")
	fl.StringVarP(&f.secret, "secret", "s", "", "accepted as in RAI; it has no meaning here")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "say more")
	fl.BoolVarP(&f.debug, "debug", "d", false, "say everything")
	cmd.MarkFlagRequired("state")
	return cmd
}

// runRunner runs one runner until SIGTERM or raid's own signals; a second SIGTERM gives its
// job back.
func runRunner(ctx context.Context, f runnerFlags) error {
	dir, err := absolute(f.state)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	first, signals := onSignals(ctx, goLater, goNow) // from here on nothing is left half made by a signal
	defer signals.stop()
	lock, err := store.Lock(dir)
	if errors.Is(err, store.ErrLocked) {
		return fmt.Errorf("another runner uses %s", dir)
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if !f.local() { // of a local one raid itself takes care
		if err := keys.Sweep(dir); err != nil {
			return err
		}
	}
	slot, err := f.slot(dir)
	if err != nil {
		return err
	}
	level := "info"
	if f.debug || f.verbose {
		level = "debug"
	}
	logger := newLogger(level).With("runner", slot.Name)
	if !f.local() { // for a local one raid itself said it
		tellUncut(first, logger)
	}
	gpus, err := ownGPUs(first, slot)
	if err != nil {
		return err
	}
	claimed, err := gpu.Claim(gpus)
	if err != nil {
		return cli.Hintf(err, "give each runner GPUs of its own: --gpu UUID")
	}
	defer claimed.Close()
	health := gpu.NewMonitor(gpus)
	defer health.Close()
	engine, rules, err := f.newEngine(first, dir, slot, logger.Warnf)
	if err != nil && first.Err() != nil {
		return nil // told to go before there was anything to do
	}
	if err != nil {
		return err
	}
	caches, err := openCaches(dir, slot)
	if err != nil {
		return err
	}
	defer caches.Close()
	slot.tellPools(engine.Name(), logger.Warnf)
	if w := engine.Weakness(); w != "" {
		logger.Warn("weaker than a container", "engine", engine.Name(), "what", w)
	}
	var builds *job.Builds
	if _, ok := engine.(box.Builder); ok && slot.Config.builds() {
		builds = &slot.Config.Builds
	}
	id, err := runnerID(dir)
	if err != nil {
		return err
	}
	r := runner.New(runner.Config{Dir: dir, ID: id, Name: slot.Name, Pools: slot.Pools, Arch: runtime.GOARCH, Engine: engine,
		Rules: rules, Builds: builds, GPUs: gpus, Check: health.Check, Recheck: slot.Config.Check, Data: slot.Config.Data, Cache: caches,
		Limits: slot.Config.Limits, Orphan: slot.Config.Orphan, Warm: slot.Config.Warm, Fresh: slot.Config.fresh(), Express: slot.Express,
		Local: f.local(), Logf: logger.Infof,
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

// slot is slot.json for a local runner, and made from flags for another.
func (f *runnerFlags) slot(dir string) (slotFile, error) {
	if f.local() {
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
	s := slotFile{Name: f.name, Servers: f.servers, Pools: f.pools, GPUs: f.gpus, Config: c.rules()}
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

// tellPools says which pools want another engine than this runner's. raid offers it no job
// of theirs.
func (s *slotFile) tellPools(engine string, logf func(string, ...any)) {
	for _, p := range s.Pools {
		if want := s.Config.Engines[p]; want != "" && want != engine {
			logf("takes no jobs of pool %s: it wants %s, and this runner makes boxes with %s; give it a runner of its own: -q %s", p, want, engine, p)
		}
	}
}

func readSlot(dir string) (s slotFile, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "slot.json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// local reports whether a raid serve beside it has prepared the runner.
func (f *runnerFlags) local() bool { return len(f.servers) == 0 }

// dial connects to raid: to the first of several that answers. A local runner looks the
// address up every time.
func (f *runnerFlags) dial(ctx context.Context, dir string) (*dial.Client, error) {
	servers, identity, hostKeys, known := f.servers, f.identity, []string(nil), []string{f.knownHosts}
	if f.local() {
		s, err := readSlot(dir)
		if err != nil {
			return nil, err
		}
		servers, identity, hostKeys, known = s.Servers, filepath.Join(dir, "key"), []string{s.HostKey}, nil
	}
	signer, err := keys.LoadSigner(identity, nil)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, server := range servers {
		t, err := dial.Parse(server)
		if err != nil {
			return nil, err
		}
		t.Signers, t.HostKeys, t.KnownHosts = []ssh.Signer{signer}, hostKeys, known
		c, err := dial.Dial(ctx, t)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
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
		return !slices.Contains(s.GPUs, d.UUID) && !slices.Contains(s.GPUs, d.Parent) && !slices.Contains(s.GPUs, strconv.Itoa(d.Index))
	})
	if len(mine) < len(s.GPUs) {
		return nil, fmt.Errorf("of the GPUs %s only %d are there", strings.Join(s.GPUs, ", "), len(mine))
	}
	return mine, nil
}

// newEngine makes the engine that raid.toml chose, and says by what rules it makes the
// boxes of each pool, nil if it has no images. Its id is the runner's own and stays, so
// that a later process finds what an earlier one left.
func (f *runnerFlags) newEngine(ctx context.Context, dir string, s slotFile, logf func(string, ...any)) (box.Engine, map[string]*box.Rules, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	left, err := leftEngines(dir)
	if err != nil {
		return nil, nil, err
	}
	id, err := runnerID(dir)
	if err != nil {
		return nil, nil, err
	}
	rules, shim := &s.Config, []string{"shim"}
	containers := rules.containers(ctx, s.Pools, logf)
	if err := left.sweep(ctx, id, containers, logf); err != nil {
		return nil, nil, err
	}
	if !containers {
		e, err := bwrap.New(ctx, bwrap.Config{ID: id, Exe: exe, Args: shim, Images: rules.Roots, Logf: logf})
		if err != nil {
			return nil, nil, err
		}
		return e, nil, nil
	}
	key := f.identity
	if f.local() {
		key = filepath.Join(dir, "..", "..", "host_key") // that of the raid serve beside it
	}
	registries, err := accounts(rules.Registries, key)
	if err != nil {
		return nil, nil, err
	}
	e, err := docker.New(ctx, docker.Config{ID: id, Exe: exe, Args: shim, Images: rules.Box.Images, Strict: rules.Box.Strict, Caps: rules.Box.Caps,
		Refresh: rules.Refresh, Registries: registries, Logf: logf})
	if err != nil {
		return nil, nil, err
	}
	boxes := rules.boxes(s.Pools)
	for _, p := range s.Pools {
		if err := e.Check(boxes[p]); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("pool %s: %w", p, err), e.Close())
		}
	}
	return e, boxes, nil
}

// boxes are the rules of each pool's boxes.
func (r *slotRules) boxes(pools []string) map[string]*box.Rules {
	all := map[string]*box.Rules{}
	for _, p := range pools {
		all[p] = cmp.Or(r.Boxes[p], &r.Box)
	}
	return all
}

// fresh is how often a box that waits is compared with its image.
func (r *slotRules) fresh() time.Duration {
	if r.Refresh <= 0 {
		return time.Minute
	}
	return min(time.Minute, time.Duration(r.Refresh))
}

// containers decides between the engines: the first pool's, else that of [box]. Whoever
// says which images may run wants containers; if no engine answers that is said, and boxes
// are made without.
func (r *slotRules) containers(ctx context.Context, pools []string, logf func(string, ...any)) bool {
	if engine := cmp.Or(r.Engines[pools[0]], r.Engine); engine != "auto" {
		return engine == "docker"
	}
	named := false
	for _, rules := range r.boxes(pools) {
		named = named || rules.Images.Default != "" || len(rules.Images.Allow) > 0
	}
	if !named {
		return false
	}
	if docker.Answers(ctx, "") {
		return true
	}
	logf("no Docker engine answers: jobs run with the programs of the machine, not in images; [box] engine = \"docker\" would wait for it")
	return false
}

// openCaches opens the folders that teams keep on this runner, and looks whether the
// data are there: every job of their pool would fail without.
func openCaches(dir string, s slotFile) (*cache.Store, error) {
	for _, pool := range s.Pools {
		data := s.Config.Data[pool]
		if data == "" {
			continue
		}
		if i, err := os.Stat(data); err != nil || !i.IsDir() {
			return nil, cli.Hintf(fmt.Errorf("[pools.%s] data: %s is no folder here", pool, data), "mount it, or take it out of raid.toml")
		}
	}
	id, err := runnerID(dir)
	if err != nil {
		return nil, err
	}
	return cache.Open(filepath.Join(dir, "caches"), filepath.Join("/run", "raid-cache-"+id), s.Config.Caches)
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
