package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	dockerimage "github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"

	"github.com/rai-project/raid/runner/box"
)

// An image is one that is here.
type image struct {
	name    string
	id      string // what containers are made of, so that a tag that moves changes nothing
	digest  string // what results name
	env     []string
	volumes map[string]struct{}
	pulled  []string // the digests it has in the registry that its name names, if it came from there
}

// images finds images and pulls those that are missing, or have moved. Each is pulled
// once, however many boxes wait for it.
type images struct {
	api      *client.Client
	refresh  Refresh
	accounts map[string]Account
	logf     func(string, ...any)

	mu    sync.Mutex // protects the following
	pulls map[string]*pull
	asked map[string]time.Time // when a registry was last asked about an image
}

// get returns the image of a box, pulling it if it is not here or has moved. The error is
// a [box.RefusedError] if it may not be run, or if a build file named what does not exist.
func (s *images) get(ctx context.Context, c box.Config) (*image, error) {
	if may := &c.Rules.Images; !may.Take(c.Image, c.Role) {
		return nil, &box.RefusedError{Why: may.NotAllowed(c.Image)}
	}
	name := c.Rules.Images.Of(c.Image)
	say := c.Say
	if say == nil {
		say = func(string) {}
	}
	img, err := s.look(ctx, name)
	switch {
	case err == nil && s.due(img):
		return s.renew(ctx, img, say)
	case !errdefs.IsNotFound(err):
		return img, err
	case s.refresh == Never:
		return nil, fmt.Errorf("the image %s is not on this machine, and it pulls none: [box] pull = \"never\"", name)
	}
	say("pulling " + name + ": it is not on this machine yet")
	err = s.pull(ctx, name, say)
	if errors.As(err, new(*noImageError)) && c.Image != "" && c.Image != c.Rules.Images.Default {
		return nil, &box.RefusedError{Why: err.Error()}
	}
	if err != nil {
		return nil, err
	}
	return s.look(ctx, name)
}

// look returns an image that is here.
func (s *images) look(ctx context.Context, name string) (*image, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	info, err := s.api.ImageInspect(ctx, name)
	if errdefs.IsInvalidArgument(err) {
		return nil, &box.RefusedError{Why: fmt.Sprintf("%q is no name of an image", name)}
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	if borrowed(name, info.RepoTags, info.RepoDigests) {
		return nil, fmt.Errorf("image %s: %w: a job is about to push one of that name", name, errdefs.ErrNotFound)
	}
	img := &image{name: name, id: info.ID, digest: info.ID}
	for _, d := range info.RepoDigests { // of the registry, if it came from one
		repo, digest, _ := strings.Cut(d, "@")
		same := sameRepo(name, repo)
		if same {
			img.pulled = append(img.pulled, digest)
		}
		if img.digest == info.ID || same {
			img.digest = digest
		}
	}
	if info.Config != nil {
		img.env, img.volumes = info.Config.Env, info.Config.Volumes
	}
	return img, nil
}

// sameRepo reports whether an image's name is of a repository.
func sameRepo(name, repo string) bool {
	name = strings.TrimPrefix(strings.TrimPrefix(name, "docker.io/"), "library/")
	return name == repo || strings.HasPrefix(name, repo+":") || strings.HasPrefix(name, repo+"@")
}

// A pull is under way. It ends with the last of those who wait for it.
type pull struct {
	waiting int
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when err is set
	err     error

	mu   sync.Mutex // protects the following
	line string     // how far it is
}

// pull pulls an image, or joins the pull that is under way, and tells how it goes. The
// error is a noImageError if the registry does not have it.
func (s *images) pull(ctx context.Context, name string, say func(string)) error {
	p := s.join(name)
	defer s.leave(name, p)
	began := time.Now()
	tick := time.NewTicker(sayEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			say(fmt.Sprintf("pulling %s: %s", name, p.progress()))
		case <-p.done:
			if p.err == nil {
				say(fmt.Sprintf("pulled %s: %s in %v", name, p.progress(), time.Since(began).Round(time.Second/10)))
			}
			return p.err
		}
	}
}

const (
	sayEvery   = 10 * time.Second // between two lines about a pull
	pullStall  = 2 * time.Minute  // a pull that says nothing for so long has failed
	pullWithin = time.Hour        // and one that takes so long, too
)

func (s *images) join(name string) *pull {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pulls[name]
	if p == nil {
		ctx, cancel := context.WithCancelCause(context.Background()) // run bounds it
		p = &pull{cancel: cancel, done: make(chan struct{})}
		if s.pulls == nil {
			s.pulls = map[string]*pull{}
		}
		s.pulls[name] = p
		go p.run(ctx, s, name) // leave waits for it
	}
	p.waiting++
	return p
}

// leave forgets a pull that nobody waits for any more, after its end.
func (s *images) leave(name string, p *pull) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.waiting--; p.waiting > 0 {
		return
	}
	p.cancel(errors.New("nobody waits for it any more"))
	<-p.done
	delete(s.pulls, name)
}

// A noImageError is about an image that its registry does not have.
type noImageError struct{ name string }

func (e *noImageError) Error() string {
	return fmt.Sprintf("there is no image %q, or its registry does not show it to this runner", e.name)
}

func (p *pull) run(ctx context.Context, s *images, name string) {
	defer close(p.done)
	stall := time.AfterFunc(pullStall, func() { p.cancel(fmt.Errorf("the registry said nothing for %v", pullStall)) })
	defer stall.Stop()
	defer time.AfterFunc(pullWithin, func() { p.cancel(fmt.Errorf("it took longer than %v", pullWithin)) }).Stop()
	err := p.follow(ctx, s, name, func() { stall.Reset(pullStall) })
	switch {
	case err == nil:
		s.note(name)
	case ctx.Err() != nil:
		p.err = fmt.Errorf("pull image %s: %w", name, context.Cause(ctx))
	case errdefs.IsNotFound(err) || contains(err, "manifest unknown"):
		p.err = &noImageError{name}
	case errdefs.IsUnauthorized(err), contains(err, "unauthorized"), contains(err, "no basic auth"):
		p.err = fmt.Errorf("the registry %s does not give the image %s to this runner; staff would look at [registries] in raid.toml: %w", RegistryOf(name), name, err)
	default:
		p.err = fmt.Errorf("pull image %s: %w", name, err)
	}
}

// follow reads what the engine says about a pull.
func (p *pull) follow(ctx context.Context, s *images, name string, heard func()) error {
	r, err := s.api.ImagePull(ctx, name, dockerimage.PullOptions{RegistryAuth: s.auth(name)})
	if err != nil {
		return err
	}
	defer r.Close()
	layers := map[string][2]int64{} // bytes here, bytes in all
	for in := json.NewDecoder(r); ; {
		var m struct {
			ID, Status, Error string
			ProgressDetail    struct{ Current, Total int64 }
		}
		if err := in.Decode(&m); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		heard()
		if m.Error != "" {
			return errors.New(m.Error)
		}
		switch l := layers[m.ID]; {
		case m.Status == "Downloading" && m.ProgressDetail.Total > 0:
			layers[m.ID] = [2]int64{m.ProgressDetail.Current, m.ProgressDetail.Total}
		case m.Status == "Download complete":
			layers[m.ID] = [2]int64{l[1], l[1]}
		}
		p.note(layers)
	}
}

// note sums up the layers that are known so far.
func (p *pull) note(layers map[string][2]int64) {
	var here, all int64
	for _, l := range layers {
		here, all = here+l[0], all+l[1]
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.line = fmt.Sprintf("%s of %s", size(here), size(all))
	if here == all {
		p.line = size(all)
	}
}

func (p *pull) progress() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return cmp.Or(p.line, "waiting for the registry")
}

// size is a number of bytes as people say it.
func size(n int64) string {
	if n < 1<<30 {
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}

// stepEnv is what steps in an image should find set: its own variables, but for those
// that would not reach them from the engine either, and who they are.
func stepEnv(img *image, r *box.Rules) []string {
	user := "root"
	if r.Strict {
		user = "nobody"
	}
	env := []string{"HOME=" + home(r), "USER=" + user, "LOGNAME=" + user}
	for _, kv := range img.env {
		name, _, _ := strings.Cut(kv, "=")
		if name != "HOME" && name != "USER" && name != "LOGNAME" && !strings.HasPrefix(name, "NVIDIA_") {
			env = append(env, kv)
		}
	}
	return env
}
