package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/stream"
)

// This file is what doctor looks at. Each examine function gathers facts; the judge
// below it says what they mean.

func examineConfig(p *patient) []finding {
	const what = "raid.toml"
	if p.file == "" {
		return []finding{good(what, "no --config: all defaults")}
	}
	if _, err := readConfig(p.file); err != nil {
		return []finding{bad(what, "raid serve would not start; the rest is looked at with the defaults", "%v", err)}
	}
	return []finding{good(what, "%s is valid", p.file)}
}

func examineState(_ context.Context, p *patient) []finding {
	const what = "state folder"
	i, err := os.Stat(p.state)
	if errors.Is(err, fs.ErrNotExist) {
		return []finding{good(what, "%s is not there yet; raid serve makes it", p.state)}
	}
	if err != nil {
		return []finding{bad(what, "", "%v", err)}
	}
	all := []finding{judgeFolder(p.state, i)}
	for _, name := range [...]string{"host_key", "admin"} {
		path := filepath.Join(p.state, name)
		if i, err := os.Stat(path); err == nil && i.Mode().Perm()&0o077 != 0 {
			all = append(all, bad("key", "chmod 600 "+path, "others can read %s", path))
		}
	}
	return all
}

func judgeFolder(dir string, i fs.FileInfo) finding {
	const what = "state folder"
	s, ok := i.Sys().(*syscall.Stat_t)
	switch {
	case !i.IsDir():
		return bad(what, "choose another with --state", "%s is no folder", dir)
	case i.Mode().Perm()&0o077 != 0:
		return bad(what, "it holds private keys: chmod 700 "+dir, "others can look into %s", dir)
	case ok && int(s.Uid) != os.Geteuid():
		return warn(what, "run doctor as the user that raid runs as", "%s belongs to user %d, and this is user %d", dir, s.Uid, os.Geteuid())
	}
	return good(what, "%s, for its owner only", dir)
}

func examineDisk(_ context.Context, p *patient) []finding {
	const what = "disk"
	dir := p.state
	for { // what is there already of the way to the folder
		_, err := os.Stat(dir)
		if err == nil || dir == filepath.Dir(dir) {
			break
		}
		dir = filepath.Dir(dir)
	}
	if err := store.CheckFolder(dir); err != nil {
		return []finding{bad(what, "", "%v", err)}
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return []finding{bad(what, "", "%s: %v", dir, err)}
	}
	all := []finding{judgeDisk(dir, int64(s.Bavail)*s.Bsize, int64(s.Blocks)*s.Bsize, float64(p.c.Limits.Reserve))}
	if int64(s.Type) == unix.TMPFS_MAGIC {
		all = append(all, warn(what, "put the state folder on a disk", "%s is in memory: all jobs and keys are gone after a restart", dir))
	}
	if s.Files > 0 && s.Ffree < s.Files/50 {
		all = append(all, warn(what, "remove files", "only %d inodes of %d are free", s.Ffree, s.Files))
	}
	return all
}

func judgeDisk(dir string, free, total int64, reserve float64) finding {
	const what, fix = "disk", "make room, or lower [limits] reserve"
	kept := int64(reserve * float64(total))
	said := fmt.Sprintf("%s has %d MiB free of %d; the reserve is %d", dir, free>>20, total>>20, kept>>20)
	switch {
	case free < kept || free == 0:
		return bad(what, fix, "%s: every upload is refused", said)
	case free < 2*kept:
		return warn(what, fix, "%s: uploads will soon be refused", said)
	}
	return good(what, "%s", said)
}

// examinePort listens for a moment, or asks who does.
func examinePort(ctx context.Context, p *patient) []finding {
	const what = "port"
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", p.c.Listen)
	switch {
	case err == nil:
		l.Close()
		return []finding{good(what, "%s is free", p.c.Listen)}
	case errors.Is(err, syscall.EADDRINUSE):
		return []finding{judgeBanner(p.c.Listen, banner(ctx, p.c.Listen))}
	case errors.Is(err, syscall.EACCES):
		return []finding{bad(what, "choose a port from 1024, or start raid by systemd with CAP_NET_BIND_SERVICE", "%s is for root only", p.c.Listen)}
	}
	return []finding{bad(what, "choose another address with --listen or in raid.toml", "%v", err)}
}

// banner is the first line of whoever listens there.
func banner(ctx context.Context, addr string) string {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return ""
	}
	c, err := (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, "tcp", dialable(a))
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	b := make([]byte, 255)
	n, _ := c.Read(b)
	line, _, _ := strings.Cut(string(b[:n]), "\n")
	return strings.TrimSpace(line)
}

func judgeBanner(addr, line string) finding {
	if strings.HasPrefix(line, "SSH-2.0-raid") {
		return good("port", "raid listens on %s", addr)
	}
	return bad("port", "stop it, or choose another address with --listen or in raid.toml", "another program has %s, which says %q", addr, line)
}

func examineClock(context.Context, *patient) []finding {
	var t unix.Timex // Modes 0: only asks
	state, err := unix.Adjtimex(&t)
	return []finding{judgeClock(state, t.Status, err)}
}

func judgeClock(state int, status int32, err error) finding {
	const what = "clock"
	const timeError, unsynced = 5, 0x40 // TIME_ERROR, STA_UNSYNC: adjtimex(2)
	switch {
	case err != nil:
		return warn(what, "", "the kernel does not say whether it is right: %v", err)
	case state == timeError || status&unsynced != 0:
		return warn(what, "timedatectl set-ntp true, or run chrony; in a virtual machine its host may keep it right",
			"nothing keeps it right, as far as the kernel knows; receipts and deadlines go by it")
	}
	return good(what, "kept right by a time server")
}

func examineRedis(ctx context.Context, p *patient) (all []finding) {
	if p.c.Mirror.Redis != "" {
		all = append(all, ofSecret(p, "redis, mirror", p.c.Mirror.Redis, func(url string) []finding {
			f, err := stream.ExamineRedis(ctx, url)
			return judgeMirror(&p.c, f, err)
		})...)
	}
	if p.c.Queue.Store != "sqlite" {
		all = append(all, ofSecret(p, "redis, store", p.c.Queue.Store, func(url string) []finding {
			f, err := store.ExamineRedis(ctx, url)
			return judgeStore(url, f, err)
		})...)
	}
	if len(all) == 0 {
		return []finding{good("redis", "not used")}
	}
	return all
}

// ofSecret examines what a URL names that may be a secret.
func ofSecret(p *patient, what, url string, examine func(url string) []finding) []finding {
	if secret.Is(url) {
		private, err := os.ReadFile(filepath.Join(p.state, "host_key"))
		if err == nil {
			url, err = secret.Decrypt(url, private)
		}
		if err != nil {
			return []finding{bad(what, "rai-crypto encrypt -r "+filepath.Join(p.state, "host_key.pub"), "its URL cannot be decrypted: %v", err)}
		}
	}
	return examine(url)
}

func judgeMirror(c *config, f stream.RedisFacts, err error) (all []finding) {
	const what = "redis, mirror"
	switch {
	case err != nil:
		return []finding{warn(what, "start it; until then there is no mirror, and jobs run on", "%v", err)}
	case f.Version != "" && older(f.Version, 6, 2): // XADD MINID
		return []finding{bad(what, "install a newer one", "Redis %s is too old: 6.2 is needed", f.Version)}
	}
	bound, room := "no bound", int64(c.Mirror.Memory)
	most, _ := strconv.ParseInt(f.MaxMemory, 10, 64)
	if most > 0 {
		bound = fmt.Sprintf("%d MiB", most>>20)
		if room == 0 || most/4 < room {
			room = most / 4
		}
	}
	if most > 0 && f.Eviction == "noeviction" {
		all = append(all, warn(what, "CONFIG SET maxmemory-policy volatile-ttl", "the mirror stops when it is full: maxmemory-policy is noeviction"))
	}
	if most > 0 && f.Used > most/10*8 {
		all = append(all, warn(what, "CONFIG SET maxmemory", "it is nearly full: %d MiB of %s", f.Used>>20, bound))
	}
	if f.MaxMemory == "0" && room == 0 {
		all = append(all, warn(what, "CONFIG SET maxmemory, or set [mirror] memory", "nothing bounds what the mirror takes: neither maxmemory nor [mirror] memory is set"))
	}
	if each := 2 * int64(c.Mirror.PerJob); room > 0 && room < 4*each {
		all = append(all, warn(what, "CONFIG SET maxmemory, or set [mirror] memory or per_job",
			"there is room for %d jobs: each may take %d MiB, and all %d MiB", room/each, each>>20, room>>20))
	}
	if f.AOF && c.Queue.Store == "sqlite" {
		all = append(all, warn(what, "CONFIG SET appendonly no, unless others need it", "its disk takes every byte of every job's output: appendonly is on"))
	}
	return append(all, good(what, "Redis %s answers; maxmemory-policy %s, %d MiB of %s used", f.Version, cmp.Or(f.Eviction, "unknown"), f.Used>>20, bound))
}

// slow is how long the store's Redis may take to answer before it is worth a word: a commit
// waits for it once, a cycle of a job three times.
const slow = 5 * time.Millisecond

func judgeStore(url string, f store.RedisFacts, err error) (all []finding) {
	const what = "redis, store"
	if err != nil {
		return []finding{bad(what, "start it; until then raid does not start, or refuses jobs", "%v", err)}
	}
	told := func(errs []error, tell func(what, fix, format string, args ...any) finding) {
		for _, e := range errs {
			said, fix, _ := strings.Cut(e.Error(), ": ")
			all = append(all, tell(what, fix, "%s", said))
		}
	}
	errs, warnings := f.Judge(url)
	told(errs, bad)
	told(warnings, warn)
	if f.MaxMemory > 0 && f.Used > f.MaxMemory/10*8 {
		all = append(all, warn(what, "CONFIG SET maxmemory, or let [queue] keep be shorter", "it is nearly full, and then takes no jobs: %d MiB of %d", f.Used>>20, f.MaxMemory>>20))
	}
	if f.Latency > slow {
		all = append(all, warn(what, "run it nearer, or on a machine with less to do", "it takes %v to answer", f.Latency.Round(time.Millisecond/10)))
	}
	if len(errs) > 0 {
		return all
	}
	kept := "appendfsync " + f.Fsync
	switch {
	case !f.AOF:
		kept = "nothing kept on disk"
	case f.Fsync == "":
		kept = "kept on disk"
	case f.WaitsAOF && f.Fsync != "always":
		kept += " and WAITAOF"
	}
	bound := "no bound"
	if f.MaxMemory > 0 {
		bound = fmt.Sprintf("%d MiB", f.MaxMemory>>20)
	}
	return append(all, good(what, "%s %s, %s, %s; %d MiB of %s used; answers in %v",
		f.Server, f.Version, f.Mode, kept, f.Used>>20, bound, f.Latency.Round(10*time.Microsecond)))
}

func examineBoxes(ctx context.Context, _ *patient) []finding { return judgeBoxes(bwrap.Examine(ctx)) }

func judgeBoxes(f bwrap.Facts) (all []finding) {
	if f.Version == "" {
		all = append(all, warn("bubblewrap", "apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, RHEL)",
			"not installed: this machine can run no bubblewrap boxes"))
	} else {
		all = append(all, good("bubblewrap", "version %s", f.Version))
		if f.Start != nil {
			said, fix, _ := strings.Cut(f.Start.Error(), "\n")
			all = append(all, bad("namespaces", fix, "an empty box does not start: %s", said))
		} else {
			all = append(all, good("namespaces", "an empty box starts"))
		}
	}
	fix := "run runners as root, or by systemd with Delegate=yes: contrib/systemd/raid-runner@.service"
	switch {
	case f.Cgroup == "":
		all = append(all, warn("cgroup", fix, "none are mounted: memory, pids and cpu limits will not be enforced"))
	case len(f.Missing) > 0:
		all = append(all, warn("cgroup", fix, "%s: no %s limit will be enforced", f.Cgroup, strings.Join(f.Missing, ", ")))
	default:
		all = append(all, good("cgroup", "%s: memory, pids and cpu limits hold", f.Cgroup))
	}
	switch {
	case f.Disk != nil && !f.Root:
		all = append(all, warn("disk images", "run runners as root", "not root: the disk limit is only measured, and jobs run as this user"))
	case f.Disk != nil:
		all = append(all, warn("disk images", "modprobe loop; apt install e2fsprogs", "the disk limit is only measured: %v", f.Disk))
	default:
		all = append(all, good("disk images", "loop devices and mkfs.ext4 are there: the disk limit holds"))
	}
	return all
}

// An engineVersion is what Docker's GET /version says.
type engineVersion struct {
	Version    string
	APIVersion string `json:"ApiVersion"`
	Components []struct{ Name, Version string }
}

// An engineInfo is what Docker's GET /info says of the users of its containers.
type engineInfo struct {
	SecurityOptions []string
	DockerRootDir   string
}

// examineDocker asks the engine by its socket.
func examineDocker(ctx context.Context, p *patient) []finding {
	socket := "/var/run/docker.sock"
	if host, ok := strings.CutPrefix(os.Getenv("DOCKER_HOST"), "unix://"); ok {
		socket = host
	}
	var v engineVersion
	err := askEngine(ctx, socket, "/version", &v)
	all := judgeEngine(p.c.Box.Engine == "docker", socket, v, err)
	if err == nil {
		var i engineInfo
		err := askEngine(ctx, socket, "/info", &i)
		all = append(all, judgeUsers(p.c.containers(), i, err))
	}
	return append(all, examineToolkit(ctx)...)
}

// askEngine asks the engine behind a socket for what it says at a path.
func askEngine(ctx context.Context, socket, path string, said any) error {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return err
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s says %s", socket, res.Status)
	}
	return json.NewDecoder(http.MaxBytesReader(nil, res.Body, 1<<20)).Decode(said)
}

// A hole is a known way out of a container in versions before one.
type hole struct {
	what   string // as the engine names the component
	before [][]int
	cve    string
}

// holes are those that staff should know of. Distributions may have mended theirs
// without a new number, so each is a warning.
var holes = [...]hole{
	{"Engine", [][]int{{29, 5, 1}}, "CVE-2026-41567 and others, in copies to and from containers"},
	{"runc", [][]int{{1, 2, 8}, {1, 3, 3}}, "CVE-2025-31133, -52565 and -52881"},
	{"nvidia-container-toolkit", [][]int{{1, 17, 8}}, "CVE-2025-23266, by an image's variables"},
}

// open reports whether version has the hole: it is older than the first fix of its line.
func (h *hole) open(version string) bool {
	for _, fixed := range h.before {
		if v := numbers(version); len(v) > 1 && len(fixed) > 1 && v[0] == fixed[0] && v[1] == fixed[1] {
			return older(version, fixed...)
		}
	}
	return older(version, h.before[len(h.before)-1]...)
}

func judgeEngine(wanted bool, socket string, v engineVersion, err error) []finding {
	const what = "docker"
	absent := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
	switch {
	case err != nil && wanted:
		return []finding{bad(what, "start it (systemctl start docker), or set [box] engine = \"bwrap\"", "%v", err)}
	case absent:
		return []finding{good(what, "no engine at %s", socket)}
	case err != nil:
		return []finding{warn(what, "only members of the group docker may use it", "%v", err)}
	case older(v.Version, 20, 10):
		return []finding{bad(what, "install Docker 20.10 or newer", "engine %s is too old", v.Version)}
	}
	all := []finding{good(what, "engine %s, API %s", v.Version, v.APIVersion)}
	v.Components = slices.DeleteFunc(v.Components, func(c struct{ Name, Version string }) bool { return c.Name == "Engine" })
	v.Components = append(v.Components, struct{ Name, Version string }{"Engine", v.Version})
	for _, c := range v.Components {
		all = append(all, judgeHoles(c.Name, c.Version)...)
	}
	return all
}

// judgeUsers says who the jobs in the boxes of raid.toml are on this machine: all are one
// user, and who that is the engine's daemon.json says.
func judgeUsers(boxes []boxConfig, i engineInfo, err error) finding {
	const what, daemon = "docker users", "\"userns-remap\": \"default\" in /etc/docker/daemon.json, with the same first id in /etc/subuid and /etc/subgid, " +
		"then restart it: it pulls its images anew"
	mapped, unmapped := docker.MappedRoot(i.SecurityOptions, i.DockerRootDir)
	switch {
	case err != nil:
		return warn(what, "", "the engine does not say whether it maps them: %v", err)
	case slices.Contains(i.SecurityOptions, "name=rootless"):
		return good(what, "the engine is not root: a box's root is the engine's user")
	case unmapped != nil:
		return warn(what, "the same first id in /etc/subuid and /etc/subgid", "the disk limit is only measured: %v", unmapped)
	case mapped != 0:
		return good(what, "userns-remap: a box's root is user %d here, whom all boxes share", mapped)
	case len(boxes) == 0:
		return good(what, "userns-remap is off, and raid.toml names no images: no box is a container")
	case !slices.ContainsFunc(boxes, func(b boxConfig) bool { return !b.Strict }):
		return good(what, "strict: jobs are nobody here, whom all boxes share")
	}
	return warn(what, daemon+"\nor strict = true in [box]",
		"userns-remap is off: a box's root is this machine's root, whom all boxes share")
}

func judgeHoles(name, version string) (all []finding) {
	for _, h := range holes {
		if h.what == name && version != "" && h.open(version) {
			all = append(all, warn("docker", "update it, or see that your distribution has mended it", "%s %s has known holes: %s", name, version, h.cve))
		}
	}
	return all
}

// examineToolkit asks for the version of what gives GPUs to containers.
func examineToolkit(ctx context.Context) []finding {
	bin, err := exec.LookPath("nvidia-ctk")
	if err != nil {
		return nil
	}
	c := exec.CommandContext(ctx, bin, "--version")
	c.WaitDelay = time.Second
	out, _ := c.Output()
	for word := range strings.FieldsSeq(string(out)) {
		if len(numbers(word)) > 1 {
			return append([]finding{good("nvidia-container-toolkit", "version %s", word)}, judgeHoles("nvidia-container-toolkit", word)...)
		}
	}
	return nil
}

// older reports whether a version is before another; what is no version is not.
func older(version string, than ...int) bool {
	v := numbers(version)
	return len(v) > 0 && slices.Compare(v, than) < 0
}

// numbers are the leading numbers of a version: 20.10.24+dfsg1 has three.
func numbers(version string) (ns []int) {
	for part := range strings.SplitSeq(strings.TrimPrefix(version, "v"), ".") {
		digits := part
		if i := strings.IndexFunc(part, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
			digits = part[:i]
		}
		n, err := strconv.Atoi(digits)
		if err != nil {
			break
		}
		if ns = append(ns, n); len(digits) < len(part) {
			break
		}
	}
	return ns
}

func examineGPUs(ctx context.Context, p *patient) []finding {
	ds, err := gpu.Find(ctx)
	if err != nil {
		return judgeGPUs(p.c.Runners.PerSlot, ds, gpu.Settings{}, err)
	}
	uncut, err := gpu.Uncut(ctx)
	if err != nil {
		return judgeGPUs(p.c.Runners.PerSlot, ds, gpu.Settings{}, err)
	}
	var s gpu.Settings
	if len(ds) > 0 && ds[0].Maker == gpu.NVIDIA {
		if s, err = gpu.Examine(ctx); err != nil {
			return []finding{bad("gpu", "mend the driver", "%v", err)}
		}
	}
	return append(judgeUncut(uncut), judgeGPUs(p.c.Runners.PerSlot, ds, s, nil)...)
}

// cutHint is what to do about a GPU on which MIG is on for nothing.
func cutHint(uuid string) string {
	return fmt.Sprintf("cut it (nvidia-smi mig -i %s -lgip lists how, -cgi PROFILE -C does it), or turn MIG off: nvidia-smi -i %s -mig 0", uuid, uuid)
}

func judgeUncut(ids []string) (all []finding) {
	for _, id := range ids {
		all = append(all, warn("gpu", cutHint(id), "%s is not handed out: MIG is on, and it has no instances", id))
	}
	return all
}

func judgeGPUs(perSlot int, ds []gpu.Device, s gpu.Settings, err error) (all []finding) {
	const what = "gpu"
	switch {
	case err != nil:
		return []finding{bad(what, "mend the driver, or set [runners] local = 1 to run without GPUs", "%v", err)}
	case len(ds) == 0:
		return []finding{good(what, "none: neither nvidia-smi nor rocm-smi is there, or they list none")}
	}
	whole := map[string]bool{}
	for _, d := range ds {
		line := fmt.Sprintf("%s, %d MiB, driver %s, %s", d.Model, d.MemoryMB, d.Driver, d.UUID)
		if d.CDI != "" {
			line += ", CDI " + d.CDI
		}
		all = append(all, good(what, "%s", line))
		if d.Maker == gpu.NVIDIA && d.Slice == nil {
			whole[d.UUID] = true
		} else if d.Maker == gpu.NVIDIA {
			whole[d.Parent] = true
		}
		if len(d.MIG) > 0 {
			all = append(all, warn(what, "", "%s is cut by MIG, but its instances are not told: it is handed out whole", d.UUID))
		}
	}
	if len(ds)%perSlot != 0 {
		all = append(all, warn(what, "choose another gpus_per_slot", "%d are left over with [runners] gpus_per_slot = %d", len(ds)%perSlot, perSlot))
	}
	if len(whole) == 0 {
		return all
	}
	return append(all, judgeSettings(len(whole), s)...)
}

func judgeSettings(gpus int, s gpu.Settings) (all []finding) {
	if s.Driver >= 0 && s.Driver != gpus {
		all = append(all, warn("gpu driver", "see the kernel's log: dmesg | grep NVRM", "it has %d GPUs, and nvidia-smi lists %d", s.Driver, gpus))
	}
	if len(s.Sleepy) > 0 {
		all = append(all, warn("gpu persistence", "systemctl enable --now nvidia-persistenced, or nvidia-smi -pm 1", "off for %s: each job waits seconds for its GPU", strings.Join(s.Sleepy, ", ")))
	} else {
		all = append(all, good("gpu persistence", "on"))
	}
	if !s.Profiled {
		all = append(all, warn("gpu profiling", "echo 'options nvidia NVreg_RestrictProfilingToAdminUsers=0' > /etc/modprobe.d/nvidia-profiling.conf, then restart",
			"jobs may not read the counters: ncu will not work"))
	} else {
		all = append(all, good("gpu profiling", "jobs may read the counters: ncu works"))
	}
	if !s.Log {
		all = append(all, warn("gpu errors", "run runners as root, and without systemd's ProtectKernelLogs", "the kernel's log cannot be read: Xid errors will not be seen"))
	} else {
		all = append(all, good("gpu errors", "Xid errors can be seen in the kernel's log"))
	}
	return all
}
