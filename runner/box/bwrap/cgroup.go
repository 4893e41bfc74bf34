package bwrap

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/box/machine"
	"github.com/rai-project/raid/runner/job"
)

// A forest is where this runner's cgroups grow: <mount>/raid/<ID> in each of the
// v1 hierarchies, or one folder of the v2 tree. The zero forest makes groups that
// limit nothing.
type forest struct {
	v1 []tree
	v2 string // the folder for boxes in the unified hierarchy, "" for none
}

// A tree is one v1 hierarchy.
type tree struct {
	has  string // the controller we want it for: memory, pids or cpu
	dir  string // <mount>/raid/<ID>
	home string // the tasks file of the group this process lives in
}

// controllers are what a box needs, in the order they are entered.
var controllers = [...]string{"memory", "pids", "cpu"}

// A group holds one box: one folder in every tree, or none where nothing is limited.
type group struct {
	v1 []tree // dir is the box's own folder
	v2 string
}

// findForest looks for cgroups that this process may use. missing names what will
// not be limited.
func findForest(id string) (f forest, missing []string) {
	mounts, err := machine.Mounts()
	if err != nil {
		return forest{}, controllers[:]
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return forest{}, controllers[:]
	}
	for _, c := range controllers {
		if t, ok := findTree(mounts, string(own), c, id); ok {
			f.v1 = append(f.v1, t)
		} else {
			missing = append(missing, c)
		}
	}
	if len(f.v1) > 0 {
		return f, missing
	}
	for _, m := range mounts {
		if m.Kind != "cgroup2" {
			continue
		}
		if dir := plant(m.At, filepath.Join(m.At, m.Below(machine.GroupOf(string(own), ""))), id, os.Geteuid() == 0); dir != "" {
			return forest{v2: dir}, nil
		}
	}
	return forest{}, controllers[:]
}

// findTree returns the v1 hierarchy with controller c if a folder can be made in it.
func findTree(mounts []machine.Mount, own, c, id string) (tree, bool) {
	for _, m := range mounts {
		if m.Kind != "cgroup" || !strings.Contains(","+m.Options+",", ","+c+",") {
			continue
		}
		t := tree{has: c, dir: filepath.Join(m.At, "raid", id),
			home: filepath.Join(m.At, m.Below(machine.GroupOf(own, c)), "tasks")}
		if os.MkdirAll(t.dir, 0o755) != nil || unix.Access(t.home, unix.W_OK) != nil {
			return tree{}, false
		}
		return t, true
	}
	return tree{}, false
}

// plant makes the folder for boxes in the v2 tree mounted at top and returns it, or
// "" where that is not allowed. The first of places that has no processes of its own
// and hands on memory and pids is taken (cgroup-v2.rst, "No Internal Process
// Constraint"; only the real root is exempt).
func plant(top, own, id string, root bool) string {
	for _, dir := range places(top, own, root) {
		home := filepath.Join(dir, "raid-"+id)
		if dir == top {
			home = filepath.Join(dir, "raid", id)
		}
		if dir == own {
			leaveOnly(own)
		}
		if handOn(dir, filepath.Dir(home), home) == nil {
			return home
		}
	}
	return ""
}

// places returns where boxes may be planted, best first: the runner's own group if it
// was delegated; then, for root, the top, where the next process will find it again;
// for others every group above, for one of them may be theirs.
func places(top, own string, root bool) []string {
	if !strings.HasPrefix(own, top) {
		return nil
	}
	if root && delegated(own) && own != top {
		return []string{own, top}
	}
	if root {
		return []string{top}
	}
	var dirs []string
	for dir := own; dir != top; dir = filepath.Dir(dir) {
		dirs = append(dirs, dir)
	}
	return append(dirs, top)
}

// delegated reports systemd's mark of Delegate=yes (systemd.resource-control(5)).
func delegated(dir string) bool {
	b := make([]byte, 1)
	for _, attr := range [...]string{"trusted.delegate", "user.delegate"} {
		if n, err := unix.Getxattr(dir, attr, b); err == nil && n == 1 && b[0] == '1' {
			return true
		}
	}
	return false
}

// leaveOnly moves this process into a leaf of its own group, if it is the only one
// there and may: afterwards the group can hand its controllers on.
func leaveOnly(own string) {
	b, err := os.ReadFile(filepath.Join(own, "cgroup.procs"))
	if err != nil || strings.TrimSpace(string(b)) != strconv.Itoa(os.Getpid()) {
		return
	}
	leaf := filepath.Join(own, "raid-runner")
	if os.Mkdir(leaf, 0o755) == nil {
		if machine.Put(leaf, "cgroup.procs", "0") != nil {
			os.Remove(leaf)
		}
	}
}

// handOn makes home below dir, every folder on the way handing its controllers on.
func handOn(dir, parent, home string) error {
	made := ""
	for _, d := range []string{dir, parent, home} {
		if _, err := os.Stat(d); err != nil {
			if err := os.Mkdir(d, 0o755); err != nil {
				os.Remove(made)
				return err
			}
			made = d
		}
		if err := enable(d); err != nil {
			os.Remove(made)
			return err
		}
	}
	return nil
}

// enable has dir hand on every controller a box needs to the groups below it. cpu is
// the one that may be missing: systemd does not delegate it everywhere.
func enable(dir string) error {
	for _, c := range controllers {
		if err := machine.Put(dir, "cgroup.subtree_control", "+"+c); err != nil && c != "cpu" {
			return err
		}
	}
	return nil
}

// make makes the cgroup of one box with its limits set.
func (f forest) make(name string, l job.Limits) (*group, error) {
	g := &group{}
	for _, t := range f.v1 {
		t.dir = filepath.Join(t.dir, name)
		if err := os.Mkdir(t.dir, 0o755); err != nil {
			return nil, errors.Join(err, g.remove())
		}
		g.v1 = append(g.v1, t)
	}
	if f.v2 != "" {
		dir := filepath.Join(f.v2, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		g.v2 = dir
	}
	if err := g.limit(l); err != nil {
		return nil, errors.Join(err, g.remove())
	}
	return g, nil
}

// all returns a group for every folder an earlier process left.
func (f forest) all() []*group {
	byName := map[string]*group{}
	get := func(name string) *group {
		if byName[name] == nil {
			byName[name] = &group{}
		}
		return byName[name]
	}
	for _, t := range f.v1 {
		for _, name := range machine.Folders(t.dir) {
			g, t := get(name), t
			t.dir = filepath.Join(t.dir, name)
			g.v1 = append(g.v1, t)
		}
	}
	if f.v2 != "" {
		for _, name := range machine.Folders(f.v2) {
			get(name).v2 = filepath.Join(f.v2, name)
		}
	}
	var gs []*group
	for _, g := range byName {
		gs = append(gs, g)
	}
	return gs
}

// remove removes the forest's own folders, which must be empty. The shared folder
// "raid" stays: another runner may be about to make its own in it.
func (f forest) remove() {
	for _, t := range f.v1 {
		os.Remove(t.dir)
	}
	if f.v2 != "" {
		os.Remove(f.v2)
	}
}

// name returns the name of the box.
func (g *group) name() string {
	if g.v2 != "" {
		return filepath.Base(g.v2)
	}
	return filepath.Base(g.v1[0].dir)
}

// limit sets the limits, also on a group that already holds processes.
func (g *group) limit(l job.Limits) error {
	for _, t := range g.v1 {
		var err error
		switch t.has {
		case "memory":
			machine.LimitSocketsV1(t.dir, l.Memory)
			err = limitMemoryV1(t.dir, l.Memory)
		case "pids":
			err = machine.Put(t.dir, "pids.max", orMax(int64(l.Pids)))
		case "cpu":
			err = limitCPUV1(t.dir, l.CPUs)
		}
		if err != nil {
			return fmt.Errorf("set %s limit: %w", t.has, err)
		}
	}
	if g.v2 == "" {
		return nil
	}
	return limitV2(g.v2, l)
}

// limitMemoryV1 keeps memory ≤ memory+swap at every moment, as the kernel demands,
// whether the limit rises or falls. Swap counts as memory; a kernel that does not
// account swap (swapaccount=0) gets swappiness 0 instead.
func limitMemoryV1(dir string, bytes int64) error {
	v, swap := "-1", "memory.memsw.limit_in_bytes"
	if bytes > 0 {
		v = strconv.FormatInt(bytes, 10)
	}
	if _, err := os.Stat(filepath.Join(dir, swap)); err != nil {
		machine.Put(dir, "memory.swappiness", "0") // best effort: v1 only
		return machine.Put(dir, "memory.limit_in_bytes", v)
	}
	if machine.Put(dir, "memory.limit_in_bytes", v) != nil { // raised above the old sum?
		if err := machine.Put(dir, swap, v); err != nil {
			return err
		}
		return machine.Put(dir, "memory.limit_in_bytes", v)
	}
	return machine.Put(dir, swap, v)
}

const cpuPeriod = 100_000 // µs, the kernel's default

func limitCPUV1(dir string, cpus float64) error {
	quota := int64(-1)
	if cpus > 0 {
		quota = cpuQuota(cpus)
	}
	return machine.Put(dir, "cpu.cfs_quota_us", strconv.FormatInt(quota, 10))
}

// cpuQuota is never under the millisecond that the kernel takes at least.
func cpuQuota(cpus float64) int64 {
	return max(1000, int64(math.Round(cpus*cpuPeriod)))
}

func limitV2(dir string, l job.Limits) error {
	cpu := "max"
	if l.CPUs > 0 {
		cpu = strconv.FormatInt(cpuQuota(l.CPUs), 10)
	}
	swap := "max"
	if l.Memory > 0 {
		swap = "0"
	}
	for _, w := range [...]struct{ file, value string }{
		{"memory.max", orMax(l.Memory)},
		{"memory.swap.max", swap},
		{"pids.max", orMax(int64(l.Pids))},
		{"cpu.max", cpu + " " + strconv.Itoa(cpuPeriod)},
	} {
		err := machine.Put(dir, w.file, w.value)
		absent := errors.Is(err, fs.ErrNotExist)
		if absent && (w.file == "memory.swap.max" || w.file == "cpu.max") {
			continue // a kernel without swap, a subtree without cpu
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", w.file, err)
		}
	}
	return nil
}

func orMax(n int64) string {
	if n <= 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

// start starts cmd with all it will ever fork inside the group. The caller must have
// locked its goroutine to its thread. With v2 the kernel forks into the group
// (CLONE_INTO_CGROUP). In v1 groups hold threads, and a child inherits those of the
// thread that forks: this thread enters, forks, and goes back. Moving oneself takes
// no global lock in the kernel (cgroup_procs_write_start), so it is cheap, and Go
// never makes a thread from a locked one. stray reports that it could not go back:
// the thread must end, and cmd with it.
func (g *group) start(cmd *exec.Cmd) (stray bool, err error) {
	if g.v2 != "" {
		f, err := os.Open(g.v2)
		if err != nil {
			return false, err
		}
		defer f.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(f.Fd())
	}
	defer func() {
		for _, t := range g.v1 {
			if e := os.WriteFile(t.home, []byte("0"), 0); e != nil {
				stray, err = true, errors.Join(err, fmt.Errorf("leave the box's cgroup: %w", e))
			}
		}
	}()
	for _, t := range g.v1 {
		if err := machine.Put(t.dir, "tasks", "0"); err != nil {
			return false, fmt.Errorf("enter the box's cgroup: %w", err)
		}
	}
	return false, cmd.Start()
}

// pids returns the processes in the group, never this one.
func (g *group) pids() (pids []int) {
	dirs := []string{g.v2}
	for _, t := range g.v1 {
		dirs = append(dirs, t.dir)
	}
	for _, d := range dirs {
		if d == "" {
			continue
		}
		b, _ := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		for _, f := range strings.Fields(string(b)) {
			// 0 is a process outside of our own PID namespace.
			if n, err := strconv.Atoi(f); err == nil && n > 0 && n != os.Getpid() {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// kill sends SIGKILL to every process in the group, once.
func (g *group) kill() {
	if g.v2 != "" && machine.Put(g.v2, "cgroup.kill", "1") == nil { // Linux 5.14
		return
	}
	for _, pid := range g.pids() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// drain kills until the group is empty.
func (g *group) drain() error {
	return retry(func() error {
		g.kill()
		if n := len(g.pids()); n > 0 {
			return fmt.Errorf("%d processes will not die", n)
		}
		return nil
	})
}

// ooms returns how many processes of the group the kernel killed for memory.
func (g *group) ooms() int {
	file := ""
	if g.v2 != "" {
		file = filepath.Join(g.v2, "memory.events")
	}
	for _, t := range g.v1 {
		if t.has == "memory" {
			file = filepath.Join(t.dir, "memory.oom_control")
		}
	}
	n, _ := machine.Counter(file, "oom_kill") // it is there as long as the group is, and that is ours
	return n
}

// remove removes the group, which must be empty. A dying process can keep it busy
// for a moment after it was reaped.
func (g *group) remove() error {
	dirs := []string{g.v2}
	for _, t := range g.v1 {
		dirs = append(dirs, t.dir)
	}
	var errs []error
	for _, d := range dirs {
		if d != "" {
			errs = append(errs, retry(func() error { return rmdir(d) }))
		}
	}
	return errors.Join(errs...)
}

func rmdir(dir string) error {
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// retry calls f until it succeeds, for two seconds at most. It is for what the
// kernel finishes soon and announces to nobody.
func retry(f func() error) (err error) {
	for wait := time.Millisecond / 4; wait < time.Second; wait *= 2 {
		if err = f(); err == nil {
			return nil
		}
		time.Sleep(wait)
	}
	return f()
}
