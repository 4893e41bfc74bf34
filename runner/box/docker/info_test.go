package docker

import "testing"

func TestMappedRoot(t *testing.T) {
	userns := []string{"name=seccomp,profile=default", "name=userns"}
	for _, c := range []struct {
		options []string
		folder  string
		want    int
		ok      bool
	}{
		{[]string{"name=seccomp,profile=default"}, "/var/lib/docker/1.1", 0, true},
		{userns, "/var/lib/docker/100000.100000", 100000, true},
		{userns, "/var/lib/docker/100000.231072", 0, false}, // one number is all that disks have
		{userns, "/var/lib/docker", 0, false},
	} {
		got, err := MappedRoot(c.options, c.folder)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("MappedRoot(%q, %s) = %d, %v, want %d", c.options, c.folder, got, err, c.want)
		}
	}
}
