package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/box/bwrap"
	"github.com/rai-project/raid/runner/box/docker"
)

// leftovers are the engines in which a runner may have left boxes, as DIR/engines names
// them. An engine sweeps what its own earlier processes left; nobody would sweep it once
// raid.toml has another one.
type leftovers struct {
	file string
	used []string
}

// leftEngines reads them. A runner that is older than the file may have used both, one
// that is new none.
func leftEngines(dir string) (l leftovers, err error) {
	l.file = filepath.Join(dir, "engines")
	b, err := os.ReadFile(l.file)
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, "id")); err == nil {
			l.used = []string{"bwrap", "docker"}
		}
		return l, nil
	}
	l.used = strings.Fields(string(b))
	return l, err
}

// sweep removes what is left in the engine that is not used now, and notes the one that
// is. What cannot be reached is tried again at the next start.
func (l *leftovers) sweep(ctx context.Context, id string, containers bool, logf func(string, ...any)) error {
	now, other := "bwrap", "docker"
	if containers {
		now, other = other, now
	}
	note := []string{now}
	if slices.Contains(l.used, other) {
		if err := sweepEngine(ctx, other, id); err != nil {
			note = append(note, other)
			logf("what this runner left in %s is still there: %v", other, err)
		}
	}
	slices.Sort(note)
	if slices.Equal(note, l.used) {
		return nil
	}
	return keys.WriteFile(l.file, []byte(strings.Join(note, "\n")+"\n"), 0o600)
}

func sweepEngine(ctx context.Context, engine, id string) error {
	if engine == "bwrap" {
		return bwrap.Sweep(ctx, id)
	}
	if !docker.Answers(ctx, "") {
		return errors.New("no engine answers")
	}
	return docker.Sweep(ctx, docker.Config{ID: id})
}
