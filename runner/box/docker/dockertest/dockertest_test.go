package dockertest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rai-project/raid/runner/box/docker"
)

// Where no engine runs, tests bring their own and leave nothing of it.
func TestStartEngine(t *testing.T) {
	dockerd, err := exec.LookPath("dockerd")
	if err != nil || os.Geteuid() != 0 {
		if os.Getenv("RAID_CI") != "" {
			t.Fatal("dockerd and root are needed")
		}
		t.Skip("dockerd and root are needed")
	}
	before := interfaces(t)
	host, stop, err := startEngine(dockerd)
	if err != nil {
		t.Fatal(err)
	}
	if !docker.Answers(t.Context(), host) {
		t.Errorf("nobody answers at %s", host)
	}
	stop()
	if dir := filepath.Dir(strings.TrimPrefix(host, "unix://")); exists(dir) {
		t.Errorf("%s is still there", dir)
	}
	for name := range before {
		if !interfaces(t)[name] {
			t.Errorf("the machine has lost its network interface %s", name)
		}
	}
}

// interfaces returns the names of those that are nobody's but the machine's.
func interfaces(t *testing.T) map[string]bool {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, i := range all {
		if !strings.HasPrefix(i.Name, "veth") {
			names[i.Name] = true
		}
	}
	return names
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
