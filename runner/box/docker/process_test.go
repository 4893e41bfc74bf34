package docker

import (
	"os"
	"path/filepath"
	"testing"
)

// The engine removes the cgroup of a container that has ended, maybe before it was asked.
func TestKillsAreRemembered(t *testing.T) {
	file := filepath.Join(t.TempDir(), "memory.oom_control")
	if err := os.WriteFile(file, []byte("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, late := &process{memory: file}, &process{memory: file}
	if n, ok := p.ooms(); n != 2 || !ok {
		t.Errorf("ooms() = %d, %v, want 2", n, ok)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if n, ok := p.ooms(); n != 2 || !ok {
		t.Errorf("ooms() without a cgroup = %d, %v, want 2, as seen before", n, ok)
	}
	for _, p := range []*process{late, {}, nil} {
		if n, ok := p.ooms(); n != 0 || ok {
			t.Errorf("ooms() of what was never looked at = %d, %v, want it unknown", n, ok)
		}
	}
}
