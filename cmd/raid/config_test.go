package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/keys"
)

// readText reads text as raid.toml.
func readText(t *testing.T, text string) (config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "raid.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return readConfig(path)
}

func TestConfigDefaults(t *testing.T) {
	c, err := readText(t, "")
	if err != nil {
		t.Fatal(err)
	}
	l := c.limits()[keys.Student]
	for _, tt := range []struct {
		what      string
		got, want any
	}{
		{"listen", c.Listen, ":2222"},
		{"state", c.State, "/var/lib/raid"},
		{"guests", c.Auth.Guests, true},
		{"mirror", c.mirror(nil) == nil, true},
		{"time", l.Time, time.Hour},
		{"memory", l.Memory, int64(16 << 30)},
		{"output", l.Output, int64(64 << 20)},
		{"upload", l.Upload, int64(1 << 30)},
		{"reserve", float64(c.Limits.Reserve), 0.05},
		{"orphan", c.rules().Orphan, 30 * time.Minute},
		{"warm", c.rules().Warm, true},
	} {
		if tt.got != tt.want {
			t.Errorf("%s = %v, want %v", tt.what, tt.got, tt.want)
		}
	}
	if _, err := readConfig(""); err != nil {
		t.Errorf(`readConfig("") = %v, want nil`, err)
	}
}

// TestConfigRefuses wants an error that names the place for everything that could be a
// typo: nothing silently becomes a default.
func TestConfigRefuses(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []string // parts of the error
	}{
		{"[limits]\nmemroy = \"1GiB\"\n", []string{"unknown key", "2|", "memroy", "~~~"}},
		{"lisen = \":1\"\n", []string{"unknown key", "1|", "lisen"}},
		{"[limit]\ntime = \"1h\"\n", []string{"unknown key", "1|"}},
		{"listen = :2222\n", []string{"1|", "listen = :2222"}},
		{"listen = 1\n", []string{"listen = 1"}},
		{"[limits]\nmemory = \"lots\"\n", []string{"lots"}},
		{"[limits]\nmemory = \"-1GiB\"\n", []string{"-1GiB"}},
		{"[limits]\ntime = \"1 hour\"\n", []string{"1 hour"}},
		{"[limits]\ntime = \"-1h\"\n", []string{"-1h", "negative"}},
		{"[limits]\ntime = \"0s\"\n", []string{"[limits] time"}},
		{"[limits]\nreserve = \"5\"\n", []string{`it looks like "5%"`}},
		{"[limits]\nreserve = \"95%\"\n", []string{"at most 90%"}},
		{"[limits]\nreserve = \"-5%\"\n", []string{"at most 90%"}},
		{"[limits]\npids = -1\n", []string{"[limits] pids"}},
		{"[limits]\ncpus = -1.0\n", []string{"[limits] cpus"}},
		{"[limits]\nentries = -1\n", []string{"[limits] entries"}},
		{"[runners]\nlocal = -1\n", []string{"[runners] local"}},
		{"[runners]\nlocal = 1025\n", []string{"[runners] local"}},
		{"[runners]\nlocal = \"two\"\n", []string{"[runners] local", `"auto"`}},
		{"[runners]\nlocal = 1.5\n", []string{"[runners] local"}},
		{"[runners]\norphan = \"soon\"\n", []string{"soon"}},
		{"[box]\nengine = \"podman\"\n", []string{"[box] engine", "podman"}},
		{"[box]\nwarm = 2\n", []string{"[box] warm"}},
		{"[queue]\nstore = \"mysql\"\n", []string{"[queue] store", "mysql"}},
		{"[roles.guest]\ntime = \"1h\"\n", []string{"[roles.guest]"}},
		{"[roles.student]\ntime = \"0s\"\n", []string{"[roles.student] time"}},
		{"[roles.student]\ngpus = -1\n", []string{"[roles.student] gpus"}},
		{"[pools.\"a b\"]\n", []string{"[pools.\"a b\"]"}},
		{"[log]\nlevel = \"loud\"\n", []string{"[log] level", "loud"}},
	} {
		_, err := readText(t, tt.text)
		if err == nil {
			t.Errorf("readConfig(%q) = nil, want an error", tt.text)
			continue
		}
		for _, part := range append(tt.want, "raid.toml") {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("readConfig(%q) = %v, want %q in it", tt.text, err, part)
			}
		}
	}
}

func TestConfigRoles(t *testing.T) {
	c, err := readText(t, "[limits]\ntime = \"10m\"\nmemory = \"2GiB\"\nupload = \"1KiB\"\n"+
		"[roles.power]\ntime = \"2h\"\ngpus = 4\nnetwork = true\n")
	if err != nil {
		t.Fatal(err)
	}
	all := c.limits()
	student, power := all[keys.Student], all[keys.Power]
	if student.Time != 10*time.Minute || student.Memory != 2<<30 || student.Upload != 1<<10 || student.GPUs != 0 || student.Network {
		t.Errorf("student = %+v", student)
	}
	if power.Time != 2*time.Hour || power.Memory != 2<<30 || power.GPUs != 4 || !power.Network {
		t.Errorf("power = %+v, want what it names, and the rest as everybody", power)
	}
}

func TestConfigLocal(t *testing.T) {
	for _, tt := range []struct {
		text       string
		gpus, want int
	}{
		{"", 0, 1},
		{"", 4, 4},
		{"[runners]\nlocal = \"auto\"\n", 2, 2},
		{"[runners]\nlocal = 0\n", 4, 0},
		{"[runners]\nlocal = 3\n", 1, 3},
	} {
		c, err := readText(t, tt.text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.local(tt.gpus); got != tt.want || err != nil {
			t.Errorf("%q: local(%d) = %d, %v, want %d", tt.text, tt.gpus, got, err, tt.want)
		}
	}
}

func TestConfigPools(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []string
	}{
		{"", []string{"rai_amd64"}},
		{"[pools.zeta]\n[pools.alpha]\n", []string{"alpha", "zeta"}},
		{"[pools.alpha]\n[pools.rai_amd64]\n[pools.rai_amd64_ece408]\n", []string{"rai_amd64", "alpha", "rai_amd64_ece408"}},
	} {
		c, err := readText(t, tt.text)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.pools("amd64"); !slices.Equal(got, tt.want) {
			t.Errorf("%q: pools = %q, want %q", tt.text, got, tt.want)
		}
	}
}

// FuzzConfig wants an error or a usable configuration of any text, never a panic.
func FuzzConfig(f *testing.F) {
	f.Add("")
	f.Add("[limits]\nmemory = \"1GiB\"\nreserve = \"5%\"\n[runners]\nlocal = 2\n")
	f.Add("[pools.x]\n[roles.student]\ntime = \"1h\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := readText(t, text)
		if err != nil {
			return
		}
		if n, err := c.local(1); n < 0 || err != nil {
			t.Errorf("local = %d, %v", n, err)
		}
		if len(c.pools("amd64")) == 0 {
			t.Error("no pool")
		}
		for role, l := range c.limits() {
			if l.Time <= 0 {
				t.Errorf("%s has the time limit %v", role, l.Time)
			}
		}
	})
}
