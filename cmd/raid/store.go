package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/sshd/store"
)

// This file is where the queue is kept.

// checkStore looks at [queue] store, which may be a secret yet.
func (c *queueConfig) checkStore() error {
	switch {
	case c.Store == "sqlite" || secret.Is(c.Store):
		return nil
	case !store.IsRedisURL(c.Store):
		said, _, _ := strings.Cut(c.Store, ":") // behind it may be a password
		return fmt.Errorf(`[queue] store = %q: it is "sqlite", or a URL of Redis as "redis://127.0.0.1:6379/0"`, said)
	}
	if err := store.CheckRedisURL(c.Store); err != nil {
		return fmt.Errorf("[queue] store: %w", err)
	}
	return nil
}

// file is the file in a folder that the queue is kept in, "" for none.
func (c *queueConfig) file(dir string) string {
	if c.Store != "sqlite" {
		return ""
	}
	return filepath.Join(dir, "raid.db")
}

func inUse(err error, dir string) error {
	if errors.Is(err, store.ErrLocked) {
		return cli.Hintf(fmt.Errorf("another raid uses %s: %w", dir, err), "stop it first, or give this one a folder of its own with --state")
	}
	return err
}
