package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/gpu"
	"github.com/rai-project/raid/sshd/store"
	"github.com/rai-project/raid/sshd/store/redistest"
	"github.com/rai-project/raid/sshd/stream"
)

// inShort is findings in short: a line each, "level what: the first words".
func inShort(all []finding) string {
	var s []string
	for _, f := range all {
		s = append(s, string(f.Level)+" "+f.What+": "+f.Found)
	}
	return strings.Join(s, "\n")
}

// expect compares findings with the beginning of each line.
func expect(t *testing.T, name string, got []finding, want ...string) {
	t.Helper()
	lines := strings.Split(inShort(got), "\n")
	ok := len(got) == len(want)
	for i := range want {
		ok = ok && strings.HasPrefix(lines[i], want[i])
	}
	if !ok {
		t.Errorf("%s:\n%s\nwant lines that begin with\n%s", name, inShort(got), strings.Join(want, "\n"))
	}
	for _, f := range got {
		if f.Level == broken && f.Fix == "" {
			t.Errorf("%s: %s: an error without a fix", name, f.What)
		}
	}
}

func TestJudgeDisk(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		free, total int64
		reserve     float64
		want        string
	}{
		{50 * gib, 100 * gib, 0.05, "ok disk: D has 51200 MiB free of 102400; the reserve is 5120"},
		{9 * gib, 100 * gib, 0.05, "warning disk: "},
		{4 * gib, 100 * gib, 0.05, "error disk: "},
		{0, 100 * gib, 0, "error disk: "},
		{1, 100 * gib, 0, "ok disk: "},
	} {
		expect(t, c.want, []finding{judgeDisk("D", c.free, c.total, c.reserve)}, c.want)
	}
}

func TestExamineState(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	p := &patient{state: dir}
	expect(t, "absent", examineState(t.Context(), p), "ok state folder: "+dir+" is not there yet")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "host_key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	expect(t, "shut", examineState(t.Context(), p), "ok state folder: ")
	if err := errors.Join(os.Chmod(dir, 0o750), os.Chmod(key, 0o644)); err != nil {
		t.Fatal(err)
	}
	expect(t, "open", examineState(t.Context(), p), "error state folder: others can look into", "error key: others can read "+key)
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(dir, 0o700), os.Chmod(key, 0o600), os.Chown(dir, 31415, 31415)); err != nil {
			t.Fatal(err)
		}
		expect(t, "another's", examineState(t.Context(), p), "warning state folder: "+dir+" belongs to user 31415")
	}
	p.state = key
	expect(t, "a file", examineState(t.Context(), p)[:1], "error state folder: "+key+" is no folder")
}

func TestJudgeClock(t *testing.T) {
	for _, c := range []struct {
		state  int
		status int32
		err    error
		want   string
	}{
		{0, 0x2001, nil, "ok clock: "},
		{5, 0x40, nil, "warning clock: nothing keeps it right"},
		{0, 0x40, nil, "warning clock: nothing keeps it right"},
		{0, 0, syscall.EPERM, "warning clock: the kernel does not say"},
	} {
		expect(t, c.want, []finding{judgeClock(c.state, c.status, c.err)}, c.want)
	}
}

// TestExaminePort has ports that are free, raid's and another program's.
func TestExaminePort(t *testing.T) {
	for _, c := range []struct{ greeting, want string }{
		{"SSH-2.0-raid\r\n", "ok port: raid listens on "},
		{"SSH-2.0-OpenSSH_9.2p1\r\n", "error port: another program has "},
		{"", "error port: another program has "},
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if conn, err := l.Accept(); err == nil {
				conn.Write([]byte(c.greeting))
				conn.Close()
			}
		}()
		p := &patient{c: config{Listen: l.Addr().String()}}
		expect(t, c.greeting, examinePort(t.Context(), p), c.want+p.c.Listen)
		l.Close()
		<-done
		expect(t, "free", examinePort(t.Context(), p), "ok port: "+p.c.Listen+" is free")
	}
	expect(t, "nonsense", examinePort(t.Context(), &patient{c: config{Listen: "nowhere"}}), "error port: ")
}

func TestJudgeMirror(t *testing.T) {
	for _, c := range []struct {
		f    stream.RedisFacts
		err  error
		want []string
	}{
		{stream.RedisFacts{Version: "7.0.15", MaxMemory: "0", Eviction: "noeviction", Used: 5 << 20}, nil,
			[]string{"ok redis, mirror: Redis 7.0.15 answers; maxmemory-policy noeviction, 5 MiB of no bound used"}},
		{stream.RedisFacts{}, nil, []string{"ok redis, mirror: "}}, // it may not be asked
		{stream.RedisFacts{Version: "7.0.15", MaxMemory: "1073741824", Eviction: "noeviction"}, nil,
			[]string{"warning redis, mirror: the mirror stops when it is full", "ok redis, mirror: "}},
		{stream.RedisFacts{Version: "7.0.15", MaxMemory: "1073741824", Eviction: "volatile-ttl", Used: 900 << 20}, nil,
			[]string{"warning redis, mirror: it is nearly full: 900 MiB of 1024 MiB", "ok redis, mirror: "}},
		{stream.RedisFacts{Version: "7.0.15", MaxMemory: "16777216", Eviction: "volatile-ttl"}, nil,
			[]string{"warning redis, mirror: there is room for 2 jobs", "ok redis, mirror: "}},
		{stream.RedisFacts{Version: "7.0.15", MaxMemory: "0", AOF: true}, nil,
			[]string{"warning redis, mirror: its disk takes every byte", "ok redis, mirror: "}},
		{stream.RedisFacts{Version: "6.0.16"}, nil, []string{"error redis, mirror: Redis 6.0.16 is too old: 6.2"}},
		{stream.RedisFacts{}, errors.New("refused"), []string{"warning redis, mirror: refused"}},
	} {
		d := defaults()
		expect(t, "mirror", judgeMirror(&d, c.f, c.err), c.want...)
	}
	unbounded := defaults()
	unbounded.Mirror.Memory = 0
	expect(t, "no bound", judgeMirror(&unbounded, stream.RedisFacts{MaxMemory: "0"}, nil), "warning redis, mirror: nothing bounds", "ok redis, mirror: ")
}

func TestJudgeStore(t *testing.T) {
	const url = "redis://localhost"
	ok := store.RedisFacts{Version: "7.0.15", Server: "redis", Mode: "standalone", Eviction: "noeviction", AOF: true, Fsync: "always"}
	with := func(change func(*store.RedisFacts)) store.RedisFacts {
		f := ok
		change(&f)
		return f
	}
	for _, c := range []struct {
		f    store.RedisFacts
		err  error
		want []string
	}{
		{ok, nil, []string{"ok redis, store: redis 7.0.15, standalone, appendfsync always; 0 MiB of no bound used; answers in 0s"}},
		{store.RedisFacts{}, errors.New("refused"), []string{"error redis, store: refused"}},
		{with(func(f *store.RedisFacts) { f.Version = "6.2.0" }), nil, []string{"error redis, store: redis 6.2.0 is too old"}},
		{with(func(f *store.RedisFacts) { f.AOF, f.Eviction = false, "allkeys-lru" }), nil,
			[]string{"error redis, store: what it took is lost", "error redis, store: it may throw jobs away"}},
		{with(func(f *store.RedisFacts) { f.Fsync = "everysec" }), nil,
			[]string{"warning redis, store: a power cut loses a second or two", "ok redis, store: redis 7.0.15"}},
		{with(func(f *store.RedisFacts) { f.Used, f.MaxMemory = 90<<20, 100<<20 }), nil,
			[]string{"warning redis, store: it is nearly full, and then takes no jobs: 90 MiB of 100", "ok redis, store: "}},
		{with(func(f *store.RedisFacts) { f.Latency = 12 * time.Millisecond }), nil,
			[]string{"warning redis, store: it takes 12ms to answer", "ok redis, store: "}},
	} {
		expect(t, "store", judgeStore(url, c.f, c.err), c.want...)
	}
}

// TestExamineRedis has a Redis that loses its jobs when it starts again, and one that does not.
func TestExamineRedis(t *testing.T) {
	for byDefault, want := range map[string][]string{
		"off":             {"warning redis, store: jobs are lost when it starts again", "ok redis, store: "},
		"off ~* &* +@all": {"ok redis, store: "},
	} {
		s := redistest.Start(t, strings.Fields("--user raid on >pw ~* &* +@all --user default reset "+byDefault)...)
		p := &patient{c: defaults()}
		p.c.Queue.Store = strings.Replace(s.URL(), "unix://", "unix://raid:pw@", 1)
		all := slices.DeleteFunc(examineRedis(t.Context(), p), func(f finding) bool {
			return strings.Contains(f.Found, "to answer") // a busy machine
		})
		expect(t, byDefault, all, want...)
		if len(want) > 1 && !strings.Contains(all[0].Fix, "user default off ~* &* +@all") {
			t.Errorf("fix %q, want what to put into its ACL", all[0].Fix)
		}
	}
}

func TestJudgeBoxes(t *testing.T) {
	for _, c := range []struct {
		name string
		f    bwrap.Facts
		want []string
	}{
		{"all", bwrap.Facts{Version: "0.8.0", Cgroup: "v2", Root: true},
			[]string{"ok bubblewrap: version 0.8.0", "ok namespaces: ", "ok cgroup: v2: memory, pids and cpu limits hold", "ok disk images: "}},
		{"none", bwrap.Facts{Root: true, Missing: []string{"memory", "pids", "cpu"}, Disk: errors.New("no loop")},
			[]string{"warning bubblewrap: not installed", "warning cgroup: none are mounted", "warning disk images: the disk limit is only measured: no loop"}},
		{"apparmor", bwrap.Facts{Version: "0.9.0", Start: errors.New("bwrap: setting up uid map: Permission denied\napt install it"), Cgroup: "v1", Missing: []string{"cpu"}, Disk: errors.New("not root")},
			[]string{"ok bubblewrap", "error namespaces: an empty box does not start: bwrap: setting up uid map: Permission denied", "warning cgroup: v1: no cpu limit", "warning disk images: not root"}},
	} {
		got := judgeBoxes(c.f)
		expect(t, c.name, got, c.want...)
		if c.name == "apparmor" && got[1].Fix != "apt install it" {
			t.Errorf("fix %q, want what bwrap's error says", got[1].Fix)
		}
	}
}

func TestJudgeEngine(t *testing.T) {
	part := func(name, version string) (c []struct{ Name, Version string }) {
		return []struct{ Name, Version string }{{"Engine", "29.5.1"}, {name, version}}
	}
	for _, c := range []struct {
		name   string
		wanted bool
		v      engineVersion
		err    error
		want   []string
	}{
		{"absent", false, engineVersion{}, fs.ErrNotExist, []string{"ok docker: no engine"}},
		{"absent, wanted", true, engineVersion{}, fs.ErrNotExist, []string{"error docker: "}},
		{"not ours", false, engineVersion{}, fs.ErrPermission, []string{"warning docker: "}},
		{"old", false, engineVersion{Version: "19.03.1"}, nil, []string{"error docker: engine 19.03.1 is too old"}},
		{"holes", false, engineVersion{Version: "20.10.24+dfsg1", APIVersion: "1.41"}, nil, []string{"ok docker: engine 20.10.24+dfsg1, API 1.41", "warning docker: Engine 20.10.24+dfsg1 has known holes"}},
		{"well", false, engineVersion{Version: "29.5.1", Components: part("runc", "1.2.8")}, nil, []string{"ok docker: "}},
		{"runc", false, engineVersion{Version: "29.5.1", Components: part("runc", "1.3.2")}, nil, []string{"ok docker: ", "warning docker: runc 1.3.2 has known holes"}},
	} {
		expect(t, c.name, judgeEngine(c.wanted, "S", c.v, c.err), c.want...)
	}
	for version, open := range map[string]bool{"1.1.5": true, "1.2.7": true, "1.2.8": false, "1.3.2": true, "1.3.3": false, "1.4.0": false, "unknown": false} {
		if got := holes[1].open(version); got != open {
			t.Errorf("runc %s has the hole: %v, want %v", version, got, open)
		}
	}
}

func TestJudgeUsers(t *testing.T) {
	plain, mapped := engineInfo{[]string{"name=seccomp,profile=builtin"}, "/var/lib/docker"}, []string{"name=seccomp,profile=builtin", "name=userns"}
	strict, bwrap := true, "bwrap"
	image := func(c *config) { c.Box.Image = "rai/root" }
	for _, tt := range []struct {
		name string
		set  func(*config)
		i    engineInfo
		err  error
		want string
	}{
		{"plain", image, plain, nil, "warning docker users: userns-remap is off: a box's root is this machine's root, whom all boxes share"},
		{"mapped", image, engineInfo{mapped, "/var/lib/docker/100000.100000"}, nil, "ok docker users: userns-remap: a box's root is user 100000 here"},
		{"badly mapped", image, engineInfo{mapped, "/var/lib/docker/100000.231072"}, nil, "warning docker users: the disk limit is only measured"},
		{"rootless", image, engineInfo{[]string{"name=rootless"}, "/home/raid/docker"}, nil, "ok docker users: the engine is not root"},
		{"no images", func(*config) {}, plain, nil, "ok docker users: userns-remap is off, and raid.toml names no images"},
		{"strict", func(c *config) { image(c); c.Box.Strict = true }, plain, nil, "ok docker users: strict"},
		{"a strict pool", func(c *config) { image(c); c.Pools = map[string]poolConfig{"p": {Strict: &strict}} }, plain, nil, "warning docker users: userns-remap is off"},
		{"a pool's images", func(c *config) { c.Pools = map[string]poolConfig{"p": {Allow: []string{"*"}}} }, plain, nil, "warning docker users: userns-remap is off"},
		{"bubblewrap", func(c *config) { image(c); c.Box.Engine = bwrap }, plain, nil, "ok docker users: "},
		{"refused", image, engineInfo{}, errors.New("403"), "warning docker users: the engine does not say"},
	} {
		c := defaults()
		tt.set(&c)
		expect(t, tt.name, []finding{judgeUsers(c.containers(), tt.i, tt.err)}, tt.want)
	}
}

// TestAskEngine has engines that answer, refuse, and never answer.
func TestAskEngine(t *testing.T) {
	dir := t.TempDir()
	serve := func(name string, h http.HandlerFunc) string {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: h}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
		return l.Addr().String()
	}
	var v engineVersion
	err := askEngine(t.Context(), serve("well", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/version" {
			w.WriteHeader(404)
			return
		}
		w.Write([]byte(`{"Version": "29.5.1", "ApiVersion": "1.52", "Components": [{"Name": "runc", "Version": "1.3.3", "Details": {}}]}`))
	}), "/version", &v)
	if err != nil || v.Version != "29.5.1" || v.APIVersion != "1.52" || len(v.Components) != 1 || v.Components[0].Version != "1.3.3" {
		t.Errorf("askEngine = %+v, %v", v, err)
	}
	if err := askEngine(t.Context(), serve("refuses", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }), "/info", &v); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("askEngine of one that refuses: %v, want 403", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := askEngine(ctx, serve("hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }), "/info", &v); err == nil {
		t.Error("askEngine of one that hangs: no error")
	}
	if err := askEngine(t.Context(), filepath.Join(dir, "none"), "/info", &v); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("askEngine of none: %v, want that it does not exist", err)
	}
}

// TestExamineDocker has an engine whose boxes are the machine's root.
func TestExamineDocker(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	said := map[string]string{"/version": `{"Version": "29.5.1", "ApiVersion": "1.52"}`, "/info": `{"SecurityOptions": ["name=cgroupns"], "DockerRootDir": "/d"}`}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(said[r.URL.Path])) })}
	go s.Serve(l)
	defer s.Close()
	t.Setenv("DOCKER_HOST", "unix://"+l.Addr().String())
	p := &patient{c: defaults()}
	p.c.Box.Image = "rai/root"
	all := slices.DeleteFunc(examineDocker(t.Context(), p), func(f finding) bool { return f.What == "nvidia-container-toolkit" })
	expect(t, "plain", all[:min(2, len(all))], "ok docker: engine 29.5.1", "warning docker users: userns-remap is off")
	if !strings.Contains(all[1].Fix, `"userns-remap": "default"`) {
		t.Errorf("fix %q, want the line for daemon.json", all[1].Fix)
	}
}

func TestJudgeRegistry(t *testing.T) {
	for _, c := range []struct {
		user string
		err  error
		want string
	}{
		{"", nil, "ok registry R: it answers"},
		{"ada", nil, "ok registry R: it answers, and takes the account of ada"},
		{"", docker.ErrRefused, "ok registry R: it answers, and wants an account"},
		{"ada", docker.ErrRefused, "error registry R: it refuses the account of ada"},
		{"ada", context.DeadlineExceeded, "warning registry R: it does not answer: "},
	} {
		expect(t, c.want, []finding{judgeRegistry("R", c.user, c.err)}, c.want)
	}
}

func TestRegistriesNamed(t *testing.T) {
	image := "r.example.edu:5000/course:1"
	for _, tt := range []struct {
		change func(*config)
		want   string
	}{
		{func(c *config) {}, ""},
		{func(c *config) { c.Box.Image = "rai/root" }, "docker.io"},
		{func(c *config) { c.Box.Image, c.Box.Pull = "rai/root", "never" }, ""},
		{func(c *config) { c.Box.Allow = []string{"*/*", "quay.io/*", "*.example.edu/x"} }, "docker.io quay.io"},
		{func(c *config) { c.Box.Registries = []string{"*.example.edu", "push.example.edu"} }, "push.example.edu"},
		{func(c *config) { c.Pools = map[string]poolConfig{"a": {Image: &image}, "b": {Engine: "bwrap"}} }, "r.example.edu:5000"},
		{func(c *config) { c.Registries = map[string]registryConfig{"r.example.edu": {}} }, ""},
		{func(c *config) {
			c.Box.Image, c.Registries = "rai/root", map[string]registryConfig{"r.example.edu": {}}
		}, "docker.io r.example.edu"},
	} {
		c := defaults()
		tt.change(&c)
		if got := strings.Join(c.registriesNamed(), " "); got != tt.want {
			t.Errorf("registriesNamed of %+v = %q, want %q", c.Box, got, tt.want)
		}
	}
}

func TestJudgeGPUs(t *testing.T) {
	a40 := gpu.Device{Maker: gpu.NVIDIA, UUID: "GPU-a", Model: "A40", MemoryMB: 46068, Driver: "550", CDI: "nvidia.com/gpu=GPU-a"}
	slice := gpu.Device{Maker: gpu.NVIDIA, UUID: "MIG-1", Parent: "GPU-a", Slice: &gpu.MIG{}}
	cut := gpu.Device{Maker: gpu.NVIDIA, UUID: "GPU-b", MIG: []gpu.MIG{{}}}
	well := gpu.Settings{Profiled: true, Log: true, Driver: 1}
	on := []string{"ok gpu persistence: on", "ok gpu profiling: ", "ok gpu errors: "}
	for _, c := range []struct {
		name string
		per  int
		ds   []gpu.Device
		s    gpu.Settings
		err  error
		want []string
	}{
		{"none", 1, nil, well, nil, []string{"ok gpu: none"}},
		{"sick driver", 1, nil, well, errors.New("no driver"), []string{"error gpu: no driver"}},
		{"well", 1, []gpu.Device{a40}, well, nil, append([]string{"ok gpu: A40, 46068 MiB, driver 550, GPU-a, CDI nvidia.com/gpu=GPU-a"}, on...)},
		{"slices", 2, []gpu.Device{slice, slice}, well, nil, append([]string{"ok gpu: ", "ok gpu: "}, on...)},
		{"left over", 2, []gpu.Device{a40}, well, nil, append([]string{"ok gpu: ", "warning gpu: 1 are left over"}, on...)},
		{"cut", 1, []gpu.Device{cut}, well, nil, append([]string{"ok gpu: ", "warning gpu: GPU-b is cut by MIG"}, on...)},
		{"amd", 1, []gpu.Device{{Maker: gpu.AMD}}, gpu.Settings{}, nil, []string{"ok gpu: "}},
		{"badly set", 1, []gpu.Device{a40}, gpu.Settings{Sleepy: []string{"GPU-a"}, Driver: 2}, nil,
			[]string{"ok gpu: ", "warning gpu driver: it has 2 GPUs", "warning gpu persistence: off for GPU-a", "warning gpu profiling: ", "warning gpu errors: "}},
	} {
		expect(t, c.name, judgeGPUs(c.per, c.ds, c.s, c.err), c.want...)
	}
}

func TestOlder(t *testing.T) {
	for _, c := range []struct {
		version string
		than    []int
		want    bool
	}{
		{"20.10.24+dfsg1", []int{20, 10}, false}, {"20.10.24+dfsg1", []int{29, 5, 1}, true}, {"1.1.5+ds1", []int{1, 1, 12}, true},
		{"v1.4.0-rc.3", []int{1, 4, 0}, false}, {"7", []int{7, 0}, true}, {"", []int{1}, false}, {"devel", []int{1}, false}, {"6.2.1", []int{6, 2}, false},
	} {
		if got := older(c.version, c.than...); got != c.want {
			t.Errorf("older(%q, %v) = %v, want %v", c.version, c.than, got, c.want)
		}
	}
}

// TestBounded has a check that never ends.
func TestBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free := make(chan struct{})
		got := bounded(t.Context(), check{"net disk", func(context.Context, *patient) []finding { <-free; return nil }}, nil)
		if inShort(got) != "error net disk: no answer in 15s" {
			t.Errorf("bounded = %s, want that it gave up", inShort(got))
		}
		close(free)
	})
}

func TestText(t *testing.T) {
	f := bad("raid.toml", "mend it", "line one\nline two")
	if got, want := f.text(false), "error    raid.toml: line one\n         line two\n         mend it\n"; got != want {
		t.Errorf("text = %q, want %q", got, want)
	}
	if got := f.text(true); !strings.HasPrefix(got, "\033[31merror   \033[0m raid.toml") {
		t.Errorf("text in colour = %q", got)
	}
	var b bytes.Buffer
	if err := printer(&b, true)(good("a", "b")); err != nil || b.String() != `{"level":"ok","what":"a","finding":"b"}`+"\n" {
		t.Errorf("as JSON %q, %v", b.String(), err)
	}
}
