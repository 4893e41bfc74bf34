package docker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/registry"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/job"
)

// Refresh says how old what is known about a tag may be: a registry is asked where an
// image's tag points to now at most once in so long. 0 asks never about an image that is
// here.
type Refresh time.Duration

// Never pulls nothing at all: what is not here is not run.
const Never Refresh = -1

// An Account is who images are pulled as.
type Account struct{ User, Password string }

// String keeps passwords out of whatever prints a configuration.
func (a Account) String() string { return a.User }

// GoString implements [fmt.GoStringer] for the same reason.
func (a Account) GoString() string { return a.User }

// hub is Docker's own registry, which names without a host are of.
const hub = "docker.io"

// RegistryOf returns the registry that an image's name is of, "host:port".
func RegistryOf(name string) string {
	host, _, ok := strings.Cut(name, "/")
	switch {
	case !ok || !strings.ContainsAny(host, ".:") && host != "localhost", host == "index.docker.io":
		return hub
	}
	return host
}

// auth is the header by which an engine pulls an image, "" without an account.
func (s *images) auth(name string) string {
	host := RegistryOf(name)
	a, ok := s.accounts[host]
	if !ok {
		return ""
	}
	header, err := registry.EncodeAuthConfig(registry.AuthConfig{Username: a.User, Password: a.Password, ServerAddress: server(host)})
	if err != nil {
		s.logf("the account of %s: %v", host, err)
	}
	return header
}

// askWithin is how long a job waits for a registry's word about an image that is here.
const askWithin = 3 * time.Second

// due reports whether the registry is to be asked about an image that is here, and notes
// that it is. What was made here or is named by its digest does not move.
func (s *images) due(img *image) bool {
	if s.refresh <= 0 || len(img.pulled) == 0 || strings.Contains(img.name, "@") {
		return false
	}
	s.mu.Lock()
	last := s.asked[img.name]
	s.mu.Unlock()
	if time.Since(last) < time.Duration(s.refresh) {
		return false
	}
	s.note(img.name)
	return true
}

// note remembers that what is known of an image is what its registry says now.
func (s *images) note(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked == nil {
		s.asked = map[string]time.Time{}
	}
	if len(s.asked) >= maxAsked {
		clear(s.asked) // they are only asked about again
	}
	s.asked[name] = time.Now()
}

// maxAsked bounds what is remembered: students choose the tags.
const maxAsked = 1000

// renew returns what the registry's tag points to, pulled if it has moved. If that cannot
// be had, the image that is here does.
func (s *images) renew(ctx context.Context, img *image, say func(string)) (*image, error) {
	moved, err := s.moved(ctx, img)
	if err == nil && !moved {
		return img, nil
	}
	if err == nil {
		say("pulling " + img.name + ": its tag has moved")
		err = s.pull(ctx, img.name, say)
	}
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err == nil:
		return s.look(ctx, img.name)
	}
	s.logf("image %s may be old: %v", img.name, err)
	say(fmt.Sprintf("the registry of %s does not answer as it should: this job runs in the image that is here", img.name))
	return img, nil
}

// moved asks the registry whether a tag points to something else than what is here.
func (s *images) moved(ctx context.Context, img *image) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, askWithin)
	defer cancel()
	now, err := s.api.DistributionInspect(ctx, img.name, s.auth(img.name))
	if err != nil {
		return false, err
	}
	return !slices.Contains(img.pulled, string(now.Descriptor.Digest)), nil
}

// Digest implements [box.Puller].
func (e *Engine) Digest(ctx context.Context, c box.Config) (string, error) {
	if c.Rules == nil {
		c.Rules = &e.rules
	}
	img, err := e.images.get(ctx, c)
	if err != nil {
		return "", err
	}
	return img.digest, nil
}

// Pull implements [box.Puller].
func (e *Engine) Pull(ctx context.Context, rules []*box.Rules, say func(string)) {
	if e.images.refresh == Never {
		return
	}
	done := map[string]bool{}
	for _, r := range rules {
		for _, name := range named(&r.Images) {
			if done[name] || ctx.Err() != nil {
				continue
			}
			done[name] = true
			if _, err := e.images.look(ctx, name); errdefs.IsNotFound(err) {
				if err := e.images.pull(ctx, name, say); err != nil && ctx.Err() == nil {
					say(fmt.Sprintf("not pulled ahead: %v", err))
				}
			}
		}
	}
}

// named are the images that have no wildcard in their names, the default one first.
func named(i *job.Images) (names []string) {
	for _, name := range append([]string{i.Default}, i.Allow...) {
		if name != "" && !strings.ContainsAny(name, `*?[\`) {
			names = append(names, name)
		}
	}
	return names
}

var _ box.Puller = (*Engine)(nil)

// ErrRefused is what Login returns, wrapped, when a registry answers and refuses the
// account; without an account that only means that it wants one.
var ErrRefused = errors.New("the registry refuses")

// Login has the engine of c log in to a registry, "host:port" or "docker.io", as c's
// account there, or as nobody. An error other than ErrRefused means that the registry
// could not be asked. The engine keeps nothing of it.
func Login(ctx context.Context, c Config, name string) error {
	api, err := dial(c.Host)
	if err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	defer api.Close()
	a := c.Registries[name]
	_, err = api.RegistryLogin(ctx, registry.AuthConfig{Username: a.User, Password: a.Password, ServerAddress: server(name)})
	if errdefs.IsUnauthorized(err) || contains(err, "401 Unauthorized") || contains(err, "no basic auth credentials") { // moby 20.10, for registries without tokens
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

// server is how engines call a registry where they log in.
func server(name string) string {
	if name == hub {
		return "https://index.docker.io/v1/"
	}
	return name
}
