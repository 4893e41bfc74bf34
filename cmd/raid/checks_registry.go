package main

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rai-project/raid/runner/box/docker"
)

// registryTime is how long one registry may take. All are asked at once.
const registryTime = 8 * time.Second

// examineRegistries has the engine log in to every registry that raid.toml names, as a
// job's pull would: it may know proxies and certificates that we do not.
func examineRegistries(ctx context.Context, p *patient) []finding {
	const what = "registries"
	names := p.c.registriesNamed()
	if len(names) == 0 {
		return []finding{good(what, "raid.toml names none")}
	}
	if !docker.Answers(ctx, "") {
		return []finding{warn(what, "see docker above", "not looked at, for no engine answers: %s", strings.Join(names, ", "))}
	}
	accounts, err := accounts(p.c.Registries, filepath.Join(p.state, "host_key"))
	if err != nil {
		return []finding{bad(what, "encrypt the password to the key that is to read it: rai-crypto encrypt -r "+filepath.Join(p.state, "host_key.pub"), "%v", err)}
	}
	all := make([]finding, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, registryTime)
			defer cancel()
			all[i] = judgeRegistry(name, accounts[name].User, docker.Login(ctx, docker.Config{Registries: accounts}, name))
		})
	}
	wg.Wait()
	return all
}

// boxes are the rules of boxes: those of [box], then those of each pool.
func (c *config) boxes() []boxConfig {
	all := []boxConfig{c.Box}
	for _, p := range c.Pools {
		all = append(all, p.box(c.Box))
	}
	return all
}

// containers are the rules of those boxes that are containers where an engine answers.
func (c *config) containers() []boxConfig {
	return slices.DeleteFunc(c.boxes(), func(b boxConfig) bool {
		return b.Engine == "bwrap" || b.Image == "" && len(b.Allow) == 0
	})
}

// registriesNamed are those that images may be pulled from or pushed to, by whole names.
func (c *config) registriesNamed() []string {
	var names []string
	for _, b := range c.boxes() {
		if b.Engine == "bwrap" {
			continue
		}
		names = append(names, b.Registries...)
		if b.Pull == "never" {
			continue
		}
		for _, image := range append([]string{b.Image}, b.Allow...) {
			if image != "" {
				names = append(names, docker.RegistryOf(image))
			}
		}
	}
	if len(names) > 0 { // without them nothing is pulled or pushed as anybody
		for name := range c.Registries {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.DeleteFunc(slices.Compact(names), func(n string) bool { return strings.ContainsAny(n, `*?[\`) })
}

func judgeRegistry(name, user string, err error) finding {
	what := "registry " + name
	switch {
	case err == nil && user != "":
		return good(what, "it answers, and takes the account of %s", user)
	case err == nil:
		return good(what, "it answers")
	case errors.Is(err, docker.ErrRefused) && user == "":
		return good(what, "it answers, and wants an account")
	case errors.Is(err, docker.ErrRefused):
		return bad(what, "mend [registries.\""+name+"\"] user and password", "it refuses the account of %s", user)
	}
	return warn(what, "is the name right, and may the engine reach it? Jobs whose image is here run without", "it does not answer: %v", err)
}
