package queue

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/runner/job"
)

func builds(registry string) job.Record {
	b := &job.ImageBuild{Dockerfile: "Dockerfile"}
	if registry != "" {
		b.Push = &job.ImagePush{Registry: registry, Image: "a"}
	}
	return job.Record{Job: job.Job{User: "ada", Pool: "p", Kind: "run"}, Sealed: "age:sealed",
		Spec: job.Spec{Steps: []string{"true"}, Build: b, Limits: job.Limits{Time: time.Hour}}}
}

// A job that builds its image goes to a runner that does, whatever images that takes.
func TestBuildsWait(t *testing.T) {
	for _, tt := range []struct {
		builds   *job.Builds
		registry string
		lacks    string
	}{
		{nil, "", "does not build images"},
		{&job.Builds{}, "", ""},
		{&job.Builds{}, "docker.io", "does not push images to docker.io"},
		{&job.Builds{Registries: []string{"docker.io"}}, "docker.io", ""},
	} {
		w := newWorld(t)
		rec := builds(tt.registry)
		w.do(Submit{rec})
		r := Runner{ID: "r", Name: "r", Pools: []string{"p"}, Arch: "amd64", Builds: tt.builds, Images: map[string]*job.Images{"p": {}}}
		if got := w.c.Lacks(&r, &rec); got != tt.lacks {
			t.Errorf("a runner with %+v lacks %q for a push to %q, want %q", tt.builds, got, tt.registry, tt.lacks)
		}
		w.do(Join{Runner: r})
		w.do(Beat{Runner: "r", Idle: true})
		if got := len(w.c.Effects().Offers); (got == 1) != (tt.lacks == "") {
			t.Errorf("a runner with %+v got %d offers", tt.builds, got)
		}
	}
}

// What a registry is shown goes to the runner, and no row of a finished job has it.
func TestNoSecretOutlivesItsJob(t *testing.T) {
	w := newWorld(t)
	w.do(Submit{builds("docker.io")})
	w.do(Submit{builds("docker.io")})
	w.do(Join{Runner: Runner{ID: "r", Name: "r", Pools: []string{"p"}, Builds: &job.Builds{Registries: []string{"docker.io"}}}})
	w.do(Beat{Runner: "r", Idle: true})
	o := w.offer()
	if o.Sealed != "age:sealed" {
		t.Errorf("the offer has %q", o.Sealed)
	}
	if live := dump(w.c.Flush()); !bytes.Contains(live, []byte("age:sealed")) {
		t.Error("the row of a job that runs has lost it: another attempt would have none")
	}
	rec := w.finish(o, passed)
	w.do(Cancel{Job: 2, By: "ada"})
	for _, row := range w.c.Flush() {
		if strings.Contains(string(row.Value), "age:sealed") {
			t.Errorf("row %s %s has it", row.Table, row.Key)
		}
	}
	for _, r := range w.c.Effects().Changed {
		if r.State.Final() && r.Sealed != "" || rec.Sealed != "" {
			t.Errorf("job %d has it after its end", r.ID)
		}
	}
}
