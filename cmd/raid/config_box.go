package main

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/box/docker"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
)

// This file is what raid.toml says of boxes, and what pools and roles change in it.

type boxConfig struct {
	Engine  string            `toml:"engine"`  // "auto", "docker" or "bwrap"
	Image   string            `toml:"image"`   // of jobs that name none
	Allow   []string          `toml:"allow"`   // globs of images that build files may name
	Strict  bool              `toml:"strict"`  // nobody, in a read-only root
	Caps    []string          `toml:"caps"`    // what root in a container may do
	Images  map[string]string `toml:"images"`  // bwrap: image name → root folder
	Warm    int               `toml:"warm"`    // 0 to 8
	Pull    string            `toml:"pull"`    // "refresh", "missing" or "never"
	Refresh duration          `toml:"refresh"` // how old what is known of a tag may be

	Registries []string `toml:"registries"` // globs of hosts that images may be pushed to
}

// A registryConfig is who images of a registry are pulled as.
type registryConfig struct {
	User     string `toml:"user"`
	Password string `toml:"password"` // may be encrypted
}

func (b *boxConfig) check() error {
	if !slices.Contains([]string{"auto", "docker", "bwrap"}, b.Engine) {
		return fmt.Errorf("engine = %q: it is \"auto\", \"docker\" or \"bwrap\"", b.Engine)
	}
	if b.Warm < 0 || b.Warm > maxWarm {
		return fmt.Errorf("warm = %d: it is 0 to %d", b.Warm, maxWarm)
	}
	if !slices.Contains([]string{"refresh", "missing", "never"}, b.Pull) {
		return fmt.Errorf("pull = %q: it is \"refresh\", \"missing\" or \"never\"", b.Pull)
	}
	if b.Refresh <= 0 {
		return errors.New("refresh must be positive; pull = \"missing\" turns it off")
	}
	if err := checkGlobs(b.Allow); err != nil {
		return fmt.Errorf("allow %w", err)
	}
	for _, glob := range b.Registries {
		if _, err := path.Match(glob, ""); err != nil || glob == "" || strings.Contains(glob, "/") {
			return fmt.Errorf("registries = %q: it is no host; it looks like \"registry.example.edu\"", glob)
		}
	}
	if b.Strict && len(b.Caps) > 0 {
		return errors.New("caps are for root, and strict = true makes jobs nobody")
	}
	return docker.CheckCaps(b.Caps)
}

// checkNamed wants containers to have something to run.
func (b *boxConfig) checkNamed() error {
	if b.Engine == "docker" && b.Image == "" && len(b.Allow) == 0 {
		return errors.New("engine = \"docker\" needs image, the one of jobs that name none, or allow, those that may be named")
	}
	return nil
}

// maxWarm bounds the boxes that wait: each is a container with a disk.
const maxWarm = 8

func checkGlobs(globs []string) error {
	for _, g := range globs {
		if _, err := path.Match(g, ""); err != nil || g == "" {
			return fmt.Errorf("= %q: it is no pattern; it looks like \"nvidia/cuda:*\"", g)
		}
	}
	return nil
}

// box is what [box] says where the pool does not.
func (p *poolConfig) box(b boxConfig) boxConfig {
	b.Engine = cmp.Or(p.Engine, b.Engine)
	if p.Image != nil {
		b.Image = *p.Image
	}
	if p.Allow != nil {
		b.Allow = p.Allow
	}
	if p.Strict != nil {
		b.Strict = *p.Strict
	}
	if p.Caps != nil {
		b.Caps = p.Caps
	}
	return b
}

// own reports whether a pool's boxes are made by rules of its own.
func (p *poolConfig) own() bool {
	return p.Image != nil || p.Allow != nil || p.Strict != nil || p.Caps != nil
}

// rulesOf are the rules of boxes. table is where raid.toml says which images may run.
func (c *config) rulesOf(b boxConfig, table string) box.Rules {
	roles := map[string][]string{}
	for name, r := range c.Roles {
		if len(r.Images) > 0 {
			roles[name] = r.Images
		}
	}
	return box.Rules{Images: job.Images{Default: b.Image, Allow: b.Allow, Roles: roles, Table: table}, Strict: b.Strict, Caps: b.Caps}
}

// asks are what pools ask of the jobs in them.
func (c *config) asks() map[string]sshd.Rules {
	all := map[string]sshd.Rules{}
	for name, p := range c.Pools {
		all[name] = sshd.Rules{Engine: p.Engine, KeepGoing: p.KeepGoing, StrictArch: p.StrictArch}
	}
	return all
}

// checkRegistries never prints what is wrong with a password.
func checkRegistries(all map[string]registryConfig) error {
	for host, r := range all {
		if host == "" || strings.ContainsAny(host, "/ ") || r.User == "" || r.Password == "" {
			return fmt.Errorf("[registries.%q]: it is named by host:port, or docker.io, and has a user and a password", host)
		}
	}
	return nil
}

// accounts are the registries' with their passwords in the clear.
func accounts(all map[string]registryConfig, key string) (map[string]docker.Account, error) {
	plain := map[string]docker.Account{}
	for host, r := range all {
		password, err := decrypt(r.Password, key)
		if err != nil {
			return nil, fmt.Errorf("[registries.%q] password: %w", host, err)
		}
		plain[host] = docker.Account{User: r.User, Password: password}
	}
	return plain, nil
}
