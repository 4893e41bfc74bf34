package docker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/job"
)

// project is a source tar; names and contents alternate.
func project(t *testing.T, files ...string) *bytes.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(files[i+1]))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return bytes.NewReader(b.Bytes())
}

// A site is an engine for builds, which has to be as it was at the end.
type site struct {
	*docker.Engine
	id    string
	said  []string
	out   bytes.Buffer
	begun bool
}

func newSite(t *testing.T) *site {
	id := boxtest.ID()
	s := &site{id: id, Engine: newEngine(t, id, func(c *docker.Config) { c.Images.Allow = []string{"raid-nowhere.invalid/*"} })}
	t.Cleanup(func() {
		if err := s.Close(); err != nil { // sweeps what an engine was still at
			t.Error(err)
		}
		if left := leftovers(t, id); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return s
}

// leftovers lists images of a runner's builds, and what is on top of them.
func leftovers(t *testing.T, id string) (found []string) {
	t.Helper()
	all, err := api(t).ImageList(context.Background(), image.ListOptions{All: true})
	if err != nil {
		t.Fatal(err)
	}
	mine := map[string]bool{}
	for range all { // until nothing is added
		for _, i := range all {
			if !mine[i.ID] && (mine[i.ParentID] || i.Labels["raid.runner"] == id || strings.Contains(strings.Join(i.RepoTags, " "), strings.ToLower(id))) {
				mine[i.ID] = true
				found = append(found, i.ID)
			}
		}
	}
	return append(found, traces(t, id)...)
}

func (s *site) build(ctx context.Context, c box.Build) (box.Built, error) {
	s.said, s.begun = nil, false
	s.out.Reset()
	var mu sync.Mutex
	c.Say = func(line string) { mu.Lock(); defer mu.Unlock(); s.said = append(s.said, line) }
	c.Out, c.Begin = &s.out, func() { s.begun = true }
	c.Dockerfile = "Dockerfile"
	if c.ID == "" {
		c.ID = "i1"
	}
	return s.Build(ctx, c)
}

func TestBuild(t *testing.T) {
	s := newSite(t)
	from := "FROM " + os.Getenv(envImage) + "\nUSER 0\n"
	b, err := s.build(t.Context(), box.Build{Source: project(t, "Dockerfile", from+
		"ENV BUILT=yes\nRUN echo to-stdout; echo to-stderr >&2; id -u >/uid\nCOPY . /project\nLABEL raid.runner=x raid.box=y\nRUN ls -A /project\nWORKDIR /project\n",
		"kept", "1", "left", "2", "rai_build.yml", "secret", ".dockerignore", "left\n")})
	if err != nil {
		t.Fatalf("Build: %v after %q %s", err, s.said, s.out.String())
	}
	if got := s.out.String(); !strings.Contains(got, "to-stdout\n") || !strings.Contains(got, "to-stderr\n") || strings.Contains(got, "--->") || strings.Contains(got, "\x1b") {
		t.Errorf("printed %q, want what RUN said and no more", got)
	}
	if got := strings.Join(s.said, "|"); !strings.HasPrefix(got, "[image 1/8] FROM ") || !strings.HasSuffix(got, "|[image 8/8] WORKDIR /project") {
		t.Errorf("said %q", got)
	}
	if got := boxtest.Say(t, s, box.Config{Built: b}, "echo $BUILT; ls -A /project"); !strings.Contains(got, "Dockerfile\nkept\n") || strings.Contains(got, "rai_build.yml") {
		t.Errorf("in the image: %q", got)
	}
	if err := s.Sweep(t.Context()); err != nil { // not of what is open
		t.Error(err)
	}
	if got := boxtest.Say(t, s, box.Config{Built: b}, "echo still"); got != "still\n" {
		t.Errorf("after a sweep: %q", got)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// What boxes may not take from the machine, builds may not either.
func TestBuildIsBounded(t *testing.T) {
	s := newSite(t)
	const wait = "f=/sys/fs/cgroup/memory/memory.kmem.tcp.limit_in_bytes; test -e $f || exit 0; for i in $(seq 100); do test $(cat $f) -lt 1000000000 && exit 0; sleep 0.1; done; exit 1"
	b, err := s.build(t.Context(), box.Build{Limits: job.Limits{Memory: 64 << 20, Disk: 64 << 20, Pids: 100},
		Source: project(t, "Dockerfile", "FROM "+os.Getenv(envImage)+"\nUSER 0\nSHELL [\"bash\", \"-c\"]\nRUN ulimit -i -q; "+wait)})
	if err != nil {
		t.Fatalf("Build: %v after %s", err, s.out.String())
	}
	if got := strings.Join(strings.Fields(s.out.String()), " "); !strings.Contains(got, "-i) 4096") || !strings.Contains(got, "-q) 262144") {
		t.Errorf("ulimit: %s", got)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// Every way to fail has its verdict, and names the instruction.
func TestBuildFails(t *testing.T) {
	if testing.Short() {
		t.Skip("the goroutines of a build are those of TestBuild")
	}
	s := newSite(t)
	from := "FROM " + os.Getenv(envImage) + "\nUSER 0\n"
	for _, tt := range []struct {
		name, dockerfile string
		limits           job.Limits
		reason           job.Reason
		exit             int
		says             string
	}{
		{"exit", from + "RUN exit 3", job.Limits{}, job.ReasonExit, 3, "[image 3/3] RUN exit 3: exit status 3"},
		{"missing file", from + "COPY none /", job.Limits{}, job.ReasonExit, 1, "COPY none /"},
		{"outside", from + "COPY ../x /", job.Limits{}, job.ReasonExit, 1, "COPY ../x /"},
		{"no network", from + "RUN test $(ls /sys/class/net) = lo && exit 7", job.Limits{}, job.ReasonExit, 7, "exit status 7"},
		{"forks", from + "RUN sleep 3; for i in $(seq 200); do sleep 1000 & done; wait", job.Limits{Pids: 32}, job.ReasonExit, 0, "exit status"},
		{"memory", from + "RUN /bin/bash -c 'x=$(head -c 200m /dev/zero | tr \"\\\\0\" x)'; test ${#x} -gt 1 || exit 137", job.Limits{Memory: 64 << 20}, job.ReasonOOM, 137, "out of memory"},
		{"disk in one step", from + "RUN head -c 64M /dev/zero >/big; sleep 1000", job.Limits{Disk: 16 << 20}, job.ReasonDiskLimit, 153, "16 MiB"},
		{"disk in all", from + "RUN head -c 10M /dev/zero >/a\nRUN head -c 10M /dev/zero >/b\nRUN sleep 1", job.Limits{Disk: 16 << 20}, job.ReasonDiskLimit, 153, "16 MiB"},
		{"no Dockerfile", "", job.Limits{}, job.ReasonExit, 1, "no \"Dockerfile\""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := []string{"Dockerfile", tt.dockerfile}
			if tt.dockerfile == "" {
				files[0] = "other"
			}
			b, err := s.build(t.Context(), box.Build{Source: project(t, files...), Limits: tt.limits})
			if err == nil {
				b.Close()
			}
			var fault *box.BuildError
			if !errors.As(err, &fault) || fault.Reason != tt.reason || tt.exit > 0 && fault.Exit != tt.exit || !strings.Contains(fault.Why, tt.says) {
				t.Errorf("Build: %+v (%v), want %s %d %q", fault, err, tt.reason, tt.exit, tt.says)
			}
		})
	}
}

// What is not allowed is not pulled, and the build does not begin.
func TestBuildRefuses(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct{ dockerfile, want string }{
		{"FROM other/image", `[box] allow = ["other/image"]`},
		{"FROM scratch\nCOPY --from=other/image / /", `[box] allow = ["other/image"]`},
		{"FROM scratch\nADD http://127.0.0.1/ /", "ADD"},
	} {
		_, err := s.build(t.Context(), box.Build{Source: project(t, "Dockerfile", c.dockerfile)})
		var refused *box.RefusedError
		if !errors.As(err, &refused) || !strings.Contains(refused.Why, c.want) || s.begun {
			t.Errorf("Build with %q: %v, begun %v; want a RefusedError with %q", c.dockerfile, err, s.begun, c.want)
		}
	}
	// One that is allowed and cannot be had is the machine's fault.
	_, err := s.build(t.Context(), box.Build{Source: project(t, "Dockerfile", "FROM raid-nowhere.invalid/x")})
	if err == nil || errors.As(err, new(*box.RefusedError)) || errors.As(err, new(*box.BuildError)) || s.begun {
		t.Errorf("Build from a registry that is not there: %v, begun %v", err, s.begun)
	}
}

// A build that is ended leaves nothing, also when its runner was killed in the middle.
func TestBuildEnds(t *testing.T) {
	s := newSite(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	timer := time.AfterFunc(3*time.Second, func() { cancel(enough) })
	defer timer.Stop()
	began := time.Now()
	_, err := s.build(ctx, box.Build{Source: project(t, "Dockerfile", "FROM "+os.Getenv(envImage)+"\nUSER 0\nRUN echo x >/x\nRUN sleep 1000")})
	if !errors.Is(err, enough) || time.Since(began) > 20*time.Second {
		t.Errorf("Build: %v after %v, want enough", err, time.Since(began))
	}
	if err := s.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, s.id); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Until a registry has taken an image, nobody finds it by the name it asks for; what had
// that name before has it after a push that failed.
func TestPushBorrowsTheName(t *testing.T) {
	need(t)
	s := newSite(t)
	registry := newRegistry(t, "robot", "hunter2")
	b, err := s.build(t.Context(), box.Build{Source: project(t, "Dockerfile", "FROM "+os.Getenv(envImage)+"\nENV BUILT=yes")})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ref, c := registry.Addr+"/a/b:1", api(t)
	if err := c.ImageTag(t.Context(), os.Getenv(envImage), ref); err != nil {
		t.Fatal(err)
	}
	before, err := c.ImageInspect(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Push(t.Context(), ref, &job.Credentials{Username: "robot", Password: "wrong"})
	if err == nil || !errors.As(err, new(*box.BuildError)) || strings.Contains(err.Error(), "wrong") {
		t.Errorf("Push with a wrong password: %v, want a BuildError", err)
	}
	if after, err := c.ImageInspect(t.Context(), ref); err != nil || after.ID != before.ID {
		t.Errorf("after a push that failed %s is %s, %v; want what it was", ref, after.ID, err)
	}
	digest, err := b.Push(t.Context(), ref, &job.Credentials{Username: "robot", Password: "hunter2"})
	if err != nil || !strings.HasPrefix(digest, "sha256:") {
		t.Errorf("Push = %q, %v", digest, err)
	}
	if _, err := c.ImageInspect(t.Context(), ref); err == nil {
		t.Errorf("after a push %s is still here, and would be taken for the registry's", ref)
	}
}

// What a runner that died in the middle of a build leaves, the next one finds.
func TestBuildIsCutOff(t *testing.T) {
	need(t)
	l := newLine(t)
	id := boxtest.ID()
	e := newEngine(t, id, func(c *docker.Config) { c.Host = "unix://" + l.Addr().String() })
	s := &site{Engine: e, id: id}
	timer := time.AfterFunc(4*time.Second, l.hangUp)
	defer timer.Stop()
	_, err := s.build(t.Context(), box.Build{Source: project(t, "Dockerfile", "FROM "+os.Getenv(envImage)+"\nUSER 0\nRUN echo x >/x\nRUN sleep 1000")})
	if err == nil || errors.As(err, new(*box.BuildError)) || errors.As(err, new(*box.RefusedError)) {
		t.Errorf("Build without an engine: %v, want what is nobody's fault", err)
	}
	e.Close()
	if left := leftovers(t, id); len(left) == 0 {
		t.Error("there is nothing to find")
	}
	back := newEngine(t, id, nil) // sweeps
	if left := leftovers(t, id); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := back.Close(); err != nil {
		t.Error(err)
	}
}
