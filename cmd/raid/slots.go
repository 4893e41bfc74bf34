package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/charmbracelet/log"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/cache"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
)

// A slotFile is what serve tells a local runner, in DIR/runners/N/slot.json. It is
// written at every start of serve; a runner reads it before every connection, so a
// raid that comes back on another port is found again.
type slotFile struct {
	Name    string    `json:"name"`
	Servers []string  `json:"servers"` // raid, and others of the same deployment
	HostKey string    `json:"host_key"`
	Pools   []string  `json:"pools"`
	GPUs    []string  `json:"gpus,omitempty"` // UUIDs this slot owns
	Express bool      `json:"express,omitempty"`
	Config  slotRules `json:"config"`
}

// slotRules are the parts of raid.toml that concern runners.
type slotRules struct {
	Engine     string                    `json:"engine"`
	Engines    map[string]string         `json:"engines,omitempty"` // by pool, where it has one
	Box        box.Rules                 `json:"box"`               // of pools without their own
	Boxes      map[string]*box.Rules     `json:"boxes,omitempty"`   // by pool
	Refresh    docker.Refresh            `json:"refresh"`
	Registries map[string]registryConfig `json:"registries,omitempty"`
	Roots      map[string]string         `json:"roots,omitempty"` // bwrap: image name → root folder
	Warm       int                       `json:"warm"`
	Builds     job.Builds                `json:"builds"` // of containers that are not strict
	Orphan     time.Duration             `json:"orphan"`
	Check      time.Duration             `json:"gpu_check"`
	Limits     job.Limits                `json:"limits"`           // of a box that waits for its order
	Data       map[string]string         `json:"data,omitempty"`   // by pool
	Caches     map[string]cache.Quota    `json:"caches,omitempty"` // by pool
}

// A slot is one local runner: a folder, and whoever runs in it.
type slot struct {
	dir  string
	name string
}

// A registrar enters local runners into raid's books; *sshd.Server is one.
type registrar interface {
	Enrolled(line string) bool
	Enrol(ctx context.Context, e keys.Enrollment, by string) (keys.User, keys.Key, error)
	Local(line, dir string) error
}

// prepareSlots makes the folders of the local runners: a key that is enrolled, and
// slot.json. Their names begin with prefix.
func prepareSlots(ctx context.Context, c config, s *state, srv registrar, addr net.Addr, prefix string, logger *log.Logger) ([]slot, error) {
	if n, err := c.local(0); err == nil && n == 0 {
		return nil, nil // nobody asks for GPUs, which a hardened unit could not see
	}
	gpus, err := gpu.Find(ctx)
	if err != nil {
		return nil, cli.Hintf(err, "mend the driver, or set [runners] local = 1 to run without GPUs")
	}
	tellUncut(ctx, logger)
	n, err := c.local(len(gpus))
	if err != nil {
		return nil, err
	}
	var slots []slot
	var had [][]string
	for i := range n {
		sl := slot{dir: filepath.Join(s.dir, "runners", strconv.Itoa(i)), name: prefix + "-" + strconv.Itoa(i)}
		f, _ := readSlot(sl.dir)          // a new slot has none
		sl.name = cmp.Or(f.Name, sl.name) // its key is enrolled by that
		slots, had = append(slots, sl), append(had, f.GPUs)
	}
	owned, spare := assign(gpus, had, c.Runners.PerSlot)
	if spare > 0 {
		logger.Warn("GPUs that no local runner has", "count", spare, "gpus_per_slot", c.Runners.PerSlot)
	}
	for i, sl := range slots {
		f := slotFile{Name: sl.name, Servers: []string{dialable(addr)}, Pools: c.pools(runtime.GOARCH), Config: c.rules(),
			HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.host.PublicKey())))}
		f.Express = i >= n-c.Runners.Express
		f.GPUs = owned[i]
		if err := sl.prepare(ctx, srv, f); err != nil {
			return nil, fmt.Errorf("prepare runner %s: %w", sl.name, err)
		}
	}
	return slots, nil
}

// tellUncut says which GPUs are nobody's because of how MIG is set.
func tellUncut(ctx context.Context, logger *log.Logger) {
	ids, err := gpu.Uncut(ctx)
	if err != nil {
		logger.Warn("GPUs cut by MIG", "err", err)
	}
	for _, id := range ids {
		logger.Warn("a GPU is not handed out: MIG is on, and it has no instances", "gpu", id, "hint", cutHint(id))
	}
}

// assign shares out GPUs, per for each slot as long as they last, by UUID. A slot keeps
// what it had: its runner may have a job on it while indices moved. No GPU is given
// twice, and what does not fill a slot is spare.
func assign(gpus []gpu.Device, had [][]string, per int) (owned [][]string, spare int) {
	owned = make([][]string, len(had))
	free := map[string]bool{}
	for _, g := range gpus {
		free[g.UUID] = true
	}
	for i, ids := range had {
		for _, id := range ids {
			if free[id] && len(owned[i]) < per {
				owned[i], free[id] = append(owned[i], id), false
			}
		}
	}
	var rest []string
	for _, g := range gpus {
		if free[g.UUID] {
			rest = append(rest, g.UUID)
		}
	}
	for i := range owned {
		need := per - len(owned[i])
		if need > len(rest) { // a slot of a smaller size would clamp jobs by chance
			rest, owned[i] = append(rest, owned[i]...), nil
			continue
		}
		owned[i], rest = append(owned[i], rest[:need]...), rest[need:]
	}
	return owned, len(rest)
}

// cacheKeep is how long a team's cache is kept that nobody uses.
const cacheKeep = 30 * 24 * time.Hour

func (c *config) rules() slotRules {
	data, caches := map[string]string{}, map[string]cache.Quota{}
	engines, boxes := map[string]string{}, map[string]*box.Rules{}
	for name, p := range c.Pools {
		if p.Engine != "" {
			engines[name] = p.Engine
		}
		if p.own() {
			table := "[box]"
			if p.Allow != nil {
				table = "[pools." + name + "]"
			}
			rules := c.rulesOf(p.box(c.Box), table)
			boxes[name] = &rules
		}
		if p.Data != "" {
			data[name] = p.Data
		}
		if p.Cache > 0 {
			caches[name] = cache.Quota{Bytes: int64(p.Cache), Keep: cmp.Or(time.Duration(p.Keep), cacheKeep)}
		}
	}
	refresh := map[string]docker.Refresh{"refresh": docker.Refresh(c.Box.Refresh), "never": docker.Never}[c.Box.Pull]
	return slotRules{Engine: c.Box.Engine, Engines: engines, Box: c.rulesOf(c.Box, "[box]"), Boxes: boxes,
		Refresh: refresh, Registries: c.Registries, Roots: c.Box.Images, Warm: c.Box.Warm, Builds: job.Builds{Registries: c.Box.Registries},
		Orphan: time.Duration(c.Runners.Orphan), Check: time.Duration(c.Runners.Check),
		Limits: c.limits()[keys.Student].Limits, Data: data, Caches: caches}
}

// dialable turns the address of a listener into one that can be called from here.
func dialable(a net.Addr) string {
	host, port, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

func (sl *slot) prepare(ctx context.Context, srv registrar, f slotFile) error {
	if err := os.MkdirAll(sl.dir, 0o700); err != nil {
		return err
	}
	public, err := ensureKey(filepath.Join(sl.dir, "key"), "raid runner "+sl.name)
	if err != nil {
		return err
	}
	if !srv.Enrolled(public) {
		e := keys.Enrollment{User: sl.name, Role: keys.Runner, Key: public, LoopbackOnly: true}
		if _, _, err := srv.Enrol(ctx, e, "raid serve"); err != nil {
			return err
		}
	}
	if err := srv.Local(public, sl.dir); err != nil {
		return err
	}
	return sl.write(f)
}

func (sl *slot) write(f slotFile) error {
	b, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return keys.WriteFile(filepath.Join(sl.dir, "slot.json"), b, 0o600)
}

// keepSlots keeps every slot filled until ctx ends; the runners are then asked to go:
// idle ones end at once, busy ones finish their job; at a second signal they give
// their job back instead.
func keepSlots(ctx context.Context, slots []slot, signals signalBox, logger *log.Logger) {
	var wg sync.WaitGroup
	for i := range slots {
		wg.Go(func() { slots[i].keep(ctx, logger) })
	}
	<-ctx.Done()
	gone := make(chan struct{})
	go func() { defer close(gone); wg.Wait() }() // ends with keep, which a timer bounds
	select {
	case <-gone:
	case <-signals.second:
		hurry(slots)
		<-gone
	}
}

// hurry has every runner give its job back and go; keep has told it to go.
func hurry(slots []slot) {
	for i := range slots {
		if pid, held := slots[i].holder(); held && pid > 0 {
			syscall.Kill(pid, goNow)
		}
	}
}

const (
	restartMin = 500 * time.Millisecond
	restartMax = 30 * time.Second
	idleEnds   = 4 * time.Second // an idle runner that was told to go has gone by then
)

// keep starts the slot's runner whenever none is there, and waits for the one that
// is: a runner that outlived an earlier raid is adopted by leaving it alone.
func (sl *slot) keep(ctx context.Context, logger *log.Logger) {
	wait := restartMin
	for ctx.Err() == nil {
		began := time.Now()
		var err error
		if pid, held := sl.holder(); held {
			logger.Info("adopted runner", "runner", sl.name, "pid", pid)
			err = sl.await(ctx, pid)
		} else {
			err = sl.start(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > time.Minute {
			wait = restartMin
		}
		logger.Warn("runner ended", "runner", sl.name, "err", err, "log", filepath.Join(sl.dir, "log"), "again in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, restartMax)
	}
}

// holder says which process has the slot, by the lock that it holds.
func (sl *slot) holder() (pid int, held bool) {
	f, err := os.OpenFile(filepath.Join(sl.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, false
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return 0, false
	}
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, _ = strconv.Atoi(strings.TrimSpace(string(b[:n])))
	return pid, true
}

// start runs a runner in a session of its own, so that it outlives this process.
// When ctx ends it is told to go, by its process and not by the lock, which one that
// has just begun does not hold yet, and waited for as long as an idle one needs.
func (sl *slot) start(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(filepath.Join(sl.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(exe, "runner", "--state", sl.dir)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = sl.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the runner, or with this process
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		cmd.Process.Signal(sl.later())
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(idleEnds):
		return nil
	}
}

// later is the signal by which a runner that was started here goes later. One that has
// the lock heeds raid's own; before that it has no job, and might not have heard of it.
func (sl *slot) later() syscall.Signal {
	if _, held := sl.holder(); held {
		return goLater
	}
	return syscall.SIGTERM
}

// await does the same for a runner that is not our child.
func (sl *slot) await(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer unix.Close(wake[0])
	defer unix.Close(wake[1])
	stop := context.AfterFunc(ctx, func() { unix.Write(wake[1], []byte{0}) })
	defer stop()
	set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(set, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case set[0].Revents != 0:
			return errors.New("it has gone")
		}
		unix.PidfdSendSignal(fd, goLater, nil, 0)
		unix.Poll(set[:1], int(idleEnds.Milliseconds()))
		return nil
	}
}

// builds reports whether there is a pool in which images may be built.
func (r *slotRules) builds() bool {
	for _, rules := range r.Boxes {
		if !rules.Strict {
			return true
		}
	}
	return !r.Box.Strict
}
