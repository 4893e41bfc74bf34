package docker_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/boxtest"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/box/docker/dockertest"
)

// lab is what the tests of this binary share; nil if there is none.
var lab *dockertest.Lab

// newRegistry starts a registry, with a password if there is a user.
func newRegistry(t *testing.T, user, password string) *dockertest.Registry {
	t.Helper()
	need(t)
	if _, err := exec.LookPath("docker-registry"); err != nil {
		if os.Getenv("RAID_CI") != "" {
			t.Fatal(err)
		}
		t.Skip("docker-registry is not installed")
	}
	r, err := dockertest.StartRegistry(t.TempDir(), "127.0.0.1:0", user, password)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	t.Cleanup(func() {
		if err := lab.ForgetAll(context.Background(), r.Addr); err != nil {
			t.Errorf("forget the registry's images: %v", err)
		}
	})
	return r
}

// push pushes an image whose boxes find VERSION set, and returns its whole name.
func push(t *testing.T, r *dockertest.Registry, name, version string) string {
	t.Helper()
	if err := lab.Push(t.Context(), r, name, "VERSION="+version); err != nil {
		t.Fatal(err)
	}
	return r.Addr + "/" + name
}

// version starts a box and returns the VERSION of its image, and what was said meanwhile.
func version(t *testing.T, e *docker.Engine, image string) (v string, said []string, err error) {
	t.Helper()
	b, err := e.Start(t.Context(), box.Config{ID: "v", Image: image, Say: func(line string) { said = append(said, line) }})
	if err != nil {
		return "", said, err
	}
	defer b.Close()
	for _, kv := range b.(box.Imaged).Image().Env {
		if name, value, _ := strings.Cut(kv, "="); name == "VERSION" {
			v = value
		}
	}
	return v, said, nil
}

// registryEngine takes every image of a registry and forgets them at the end.
func registryEngine(t *testing.T, r *dockertest.Registry, change func(*docker.Config)) *docker.Engine {
	t.Helper()
	e := newEngine(t, boxtest.ID(), func(c *docker.Config) {
		c.Images.Allow = []string{r.Addr + "/*"}
		if change != nil {
			change(c)
		}
	})
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func TestTagMoves(t *testing.T) {
	r := newRegistry(t, "", "")
	image := push(t, r, "moving:latest", "1")
	defer lab.Forget(t.Context(), image)
	for _, c := range []struct {
		refresh docker.Refresh
		want    string
	}{{0, "1"}, {docker.Refresh(time.Hour), "2"}, {docker.Refresh(time.Nanosecond), "3"}} {
		e := registryEngine(t, r, func(cfg *docker.Config) { cfg.Refresh = c.refresh })
		got, said, err := version(t, e, image) // pulled if it is the first, and asked for by an engine that is new
		t.Logf("refresh %v: %q, %q, %v", time.Duration(c.refresh), got, said, err)
		if err != nil {
			t.Fatal(err)
		}
		before := got
		push(t, r, "moving:latest", c.want+"x")
		got, said, err = version(t, e, image)
		moved := got == c.want+"x"
		if err != nil || moved != (c.refresh == 1) || !moved && got != before {
			t.Errorf("after the tag moved, with refresh %v: version %q, %v, said %q", time.Duration(c.refresh), got, err, said)
		}
	}
}

func TestRegistryGoesAway(t *testing.T) {
	r := newRegistry(t, "", "")
	here, gone := push(t, r, "here:latest", "1"), r.Addr+"/gone:latest"
	defer lab.Forget(t.Context(), here)
	e := registryEngine(t, r, func(c *docker.Config) { c.Refresh = 1 })
	_, said, err := version(t, e, here)
	if err != nil || len(said) < 2 || !strings.Contains(said[0], "pulling "+here) || !strings.Contains(said[len(said)-1], "pulled "+here+": 8.0 MiB in") {
		t.Errorf("pull: %q, %v", said, err)
	}
	if _, _, err := version(t, e, gone); !errors.As(err, new(*box.RefusedError)) || !strings.Contains(err.Error(), gone) {
		t.Errorf("an image that the registry does not have: %v, want a RefusedError", err)
	}
	byDefault := registryEngine(t, r, func(c *docker.Config) { c.Images.Default = gone })
	if _, _, err := version(t, byDefault, ""); err == nil || errors.As(err, new(*box.RefusedError)) {
		t.Errorf("a default image that the registry does not have: %v, want staff's fault, not the job's", err)
	}
	r.Stop()
	got, said, err := version(t, e, here)
	if err != nil || got != "1" || len(said) != 1 || !strings.Contains(said[0], "the registry of "+here) {
		t.Errorf("without its registry: %q, %q, %v, want the image that is here, and a line", got, said, err)
	}
	if _, _, err := version(t, e, gone); err == nil || errors.As(err, new(*box.RefusedError)) {
		t.Errorf("an image that is not here, without its registry: %v, want an error that is not the job's", err)
	}
	never := registryEngine(t, r, func(c *docker.Config) { c.Refresh = docker.Never })
	if got, said, err := version(t, never, here); err != nil || got != "1" || len(said) > 0 {
		t.Errorf("with pull = never: %q, %q, %v", got, said, err)
	}
	if _, _, err := version(t, never, gone); err == nil || !strings.Contains(err.Error(), `pull = "never"`) {
		t.Errorf("with pull = never, an image that is not here: %v", err)
	}
}

func TestPrivateRegistry(t *testing.T) {
	const password = "correct-horse"
	r := newRegistry(t, "raid", password)
	image := push(t, r, "course/base:v1", "private")
	for _, c := range []struct {
		account docker.Account
		want    string
	}{{docker.Account{}, ""}, {docker.Account{User: "raid", Password: "wrong-" + password}, ""}, {docker.Account{User: "raid", Password: password}, "private"}} {
		lab.Forget(t.Context(), image)
		e := registryEngine(t, r, func(cfg *docker.Config) {
			cfg.Images.Allow = []string{r.Addr + "/course/*"}
			if cfg.Refresh = 1; c.account.User != "" {
				cfg.Registries = map[string]docker.Account{r.Addr: c.account}
			}
		})
		for range 2 { // pulled, and asked about
			got, said, err := version(t, e, image)
			if got != c.want || (err == nil) != (c.want != "") || errors.As(err, new(*box.RefusedError)) {
				t.Errorf("as %q: version %q, %v, want %q", c.account.User, got, err, c.want)
			}
			if all := strings.Join(said, "\n"); strings.Contains(all, password) || err != nil && strings.Contains(err.Error(), password) || strings.Contains(all, "answer") {
				t.Errorf("said %q, %v", said, err)
			}
		}
	}
	lab.Forget(t.Context(), image)
}

// What is sure to be needed is there before it is.
func TestPull(t *testing.T) {
	r := newRegistry(t, "", "")
	names := []string{push(t, r, "default:1", "1"), push(t, r, "allowed:1", "1"), push(t, r, "globbed:1", "1")}
	for _, n := range names {
		defer lab.Forget(t.Context(), n)
	}
	e := registryEngine(t, r, nil)
	rules := box.Rules{}
	rules.Images.Default, rules.Images.Allow = names[0], []string{names[1], r.Addr + "/glob*"}
	e.Pull(t.Context(), []*box.Rules{&rules}, func(line string) { t.Log(line) })
	for i, n := range names {
		if _, err := api(t).ImageInspect(t.Context(), n); (err == nil) != (i < 2) {
			t.Errorf("after Pull, %s: %v", n, err)
		}
	}
	push(t, r, "default:1", "2")
	if d, err := e.Digest(t.Context(), box.Config{Rules: &rules}); err != nil || !strings.HasPrefix(d, "sha256:") {
		t.Errorf("Digest = %q, %v", d, err)
	}
}

// Pools of one runner have boxes by their own rules.
func TestRules(t *testing.T) {
	e := newEngine(t, boxtest.ID(), func(c *docker.Config) { c.Images.Default = "" })
	defer e.Close()
	own := box.Rules{Caps: []string{"CHOWN"}}
	own.Images.Default = os.Getenv(envImage)
	if got := boxtest.Say(t, e, box.Config{Rules: &own}, "touch f; chown 1:1 f && stat -c %u f; whoami"); got != "1\nroot\n" {
		t.Errorf("with CHOWN: %q", got)
	}
	if _, err := e.Start(t.Context(), box.Config{ID: "x"}); !errors.As(err, new(*box.RefusedError)) {
		t.Errorf("by the engine's own rules: %v, want no image", err)
	}
	bad := own
	bad.Caps = []string{"SYS_ADMIN"}
	if _, err := e.Start(t.Context(), box.Config{ID: "x", Rules: &bad}); err == nil {
		t.Error("SYS_ADMIN was given")
	}
	strict := box.Rules{Images: own.Images, Strict: true}
	if os.Geteuid() != 0 {
		return // a strict box needs a runner that is root
	}
	if got := boxtest.Say(t, e, box.Config{Rules: &strict}, "whoami; echo $HOME; touch f && echo here; touch ~/f && echo home; touch /usr/f 2>/dev/null || echo read-only"); got != "nobody\n/home/rai\nhere\nhome\nread-only\n" {
		t.Errorf("strict: %q", got)
	}
}

func TestRegistryOf(t *testing.T) {
	for name, want := range map[string]string{"gcc": "docker.io", "nvidia/cuda:12": "docker.io", "docker.io/a/b": "docker.io", "index.docker.io/a": "docker.io",
		"localhost/x": "localhost", "h:5000/x/y:1": "h:5000", "ghcr.io/a/b@sha256:x": "ghcr.io", "gcc:5.4": "docker.io"} {
		if got := docker.RegistryOf(name); got != want {
			t.Errorf("RegistryOf(%q) = %q, want %q", name, got, want)
		}
	}
}
