package main

import (
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
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
)

// A slotFile is what serve tells a local runner, in DIR/runners/N/slot.json. It is
// written at every start of serve; a runner reads it before every connection, so a
// raid that comes back on another port is found again.
type slotFile struct {
	Name    string    `json:"name"`
	Server  string    `json:"server"`
	HostKey string    `json:"host_key"`
	Pools   []string  `json:"pools"`
	GPUs    []string  `json:"gpus,omitempty"` // UUIDs this slot owns
	Express bool      `json:"express,omitempty"`
	Config  slotRules `json:"config"`
}

// slotRules are the parts of raid.toml that concern runners.
type slotRules struct {
	Engine string            `json:"engine"`
	Images map[string]string `json:"images,omitempty"`
	Warm   bool              `json:"warm"`
	Orphan time.Duration     `json:"orphan"`
	Limits job.Limits        `json:"limits"` // of a box that waits for its order
}

// A slot is one local runner: a folder, and whoever runs in it.
type slot struct {
	dir  string
	name string
}

// prepareSlots makes the folders of the local runners: a key that is enrolled, and
// slot.json.
func prepareSlots(ctx context.Context, c config, s *state, srv *sshd.Server, addr net.Addr) ([]slot, error) {
	if n, err := c.local(0); err == nil && n == 0 {
		return nil, nil // nobody asks for GPUs, which a hardened unit could not see
	}
	gpus, err := gpu.Find(ctx)
	if err != nil {
		return nil, cli.Hintf(err, "mend the driver, or set [runners] local = 1 to run without GPUs")
	}
	n, err := c.local(len(gpus))
	if err != nil {
		return nil, err
	}
	var slots []slot
	for i := range n {
		sl := slot{dir: filepath.Join(s.dir, "runners", strconv.Itoa(i)), name: "local-" + strconv.Itoa(i)}
		f := slotFile{Name: sl.name, Server: dialable(addr), Pools: c.pools(runtime.GOARCH), Config: c.rules(),
			HostKey: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.host.PublicKey())))}
		f.Express = i >= n-c.Runners.Express
		if i < len(gpus) {
			f.GPUs = []string{gpus[i].UUID}
		}
		if err := sl.prepare(ctx, srv, f); err != nil {
			return nil, fmt.Errorf("prepare runner %s: %w", sl.name, err)
		}
		slots = append(slots, sl)
	}
	return slots, nil
}

func (c *config) rules() slotRules {
	return slotRules{Engine: c.Box.Engine, Images: c.Box.Images, Warm: c.Box.Warm > 0,
		Orphan: time.Duration(c.Runners.Orphan), Limits: c.limits()[keys.Student].Limits}
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

func (sl *slot) prepare(ctx context.Context, srv *sshd.Server, f slotFile) error {
	if err := os.MkdirAll(sl.dir, 0o700); err != nil {
		return err
	}
	public, err := ensureKey(filepath.Join(sl.dir, "key"), "raid runner "+sl.name)
	if err != nil {
		return err
	}
	if !srv.Enrolled(public) {
		e := keys.Enrollment{User: sl.name, Role: keys.Runner, Key: public}
		if _, _, err := srv.Enrol(ctx, e, "raid serve", true); err != nil {
			return err
		}
	}
	if err := srv.Local(public, sl.dir); err != nil {
		return err
	}
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
		tell(slots)
		<-gone
	}
}

// tell sends every runner SIGTERM, once more: keep has sent the first.
func tell(slots []slot) {
	for i := range slots {
		if pid, held := slots[i].holder(); held && pid > 0 {
			syscall.Kill(pid, syscall.SIGTERM)
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
		cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(idleEnds):
		return nil
	}
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
		unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
		unix.Poll(set[:1], int(idleEnds.Milliseconds()))
		return nil
	}
}
