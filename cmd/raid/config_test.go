package main

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/box"
	"github.com/rai-project/raid/runner/cache"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd"
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
		{"warm", c.rules().Warm, 1},
		{"gpu_check", c.rules().Check, time.Minute},
		{"gpus_per_slot", c.Runners.PerSlot, 1},
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
		{"[box]\nwarm = 9\n", []string{"[box] warm"}},
		{"[queue]\nstore = \"mysql\"\n", []string{"[queue] store", "mysql"}},
		{"[queue]\nstore = \"redis://host:port/0\"\n", []string{"[queue] store", "redis://user:password@host:6379/0"}},
		{"[queue]\nstore = \"redis://host/0?durable=no\"\n", []string{"[queue] store", `"durable"`}},
		{"[roles.guest]\ntime = \"1h\"\n", []string{"[roles.guest]"}},
		{"[roles.student]\ntime = \"0s\"\n", []string{"[roles.student] time"}},
		{"[roles.student]\ngpus = -1\n", []string{"[roles.student] gpus"}},
		{"[pools.\"a b\"]\n", []string{"[pools.\"a b\"]"}},
		{"[log]\nlevel = \"loud\"\n", []string{"[log] level", "loud"}},
		{"[runners]\ngpus_per_slot = 0\n", []string{"gpus_per_slot = 0", "1 to 64"}},
		{"[box]\npull = \"always\"\n", []string{"[box] pull", "always"}},
		{"[box]\nrefresh = \"0s\"\n", []string{"[box] refresh", "missing"}},
		{"[box]\nengine = \"docker\"\n", []string{"[box] engine", "needs image"}},
		{"[box]\nallow = [\"[\"]\n", []string{"[box] allow", "no pattern"}},
		{"[pools.x]\nengine = \"auto\"\n", []string{"[pools.x] engine", "leave it out"}},
		{"[pools.x]\nengine = \"docker\"\n", []string{"[pools.x] engine", "needs image"}},
		{"[pools.x]\nallow = [\"\"]\n", []string{"[pools.x] allow", "no pattern"}},
		{"[pools.x]\ncaps = [\"SYS_ADMIN\"]\n", []string{"[pools.x]", "SYS_ADMIN"}},
		{"[box]\ncaps = [\"CHOWN\"]\n[pools.x]\nstrict = true\n", []string{"[pools.x]", "caps"}},
		{"[roles.staff]\nimages = [\"[\"]\n", []string{"[roles.staff] images", "no pattern"}},
		{"[registries.\"h:5000\"]\npassword = \"hunter2\"\n", []string{"[registries.\"h:5000\"]", "a user and a password"}},
		{"[registries.\"https://h\"]\nuser = \"u\"\npassword = \"hunter2\"\n", []string{"host:port"}},
		{"[runners]\ngpu_check = \"0s\"\n", []string{"gpu_check must be positive"}},
	} {
		_, err := readText(t, tt.text)
		if err == nil {
			t.Errorf("readConfig(%q) = nil, want an error", tt.text)
			continue
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("readConfig(%q) = %v, which shows the password", tt.text, err)
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

func TestConfigPoolRules(t *testing.T) {
	c, err := readText(t, "[pools.a]\ndata = \"/srv/x\"\n[pools.b]\ncache = \"1GiB\"\n[pools.c]\ncache = \"2GiB\"\ncache_keep = \"24h\"\n")
	if err != nil {
		t.Fatal(err)
	}
	r := c.rules()
	if want := map[string]string{"a": "/srv/x"}; !maps.Equal(r.Data, want) {
		t.Errorf("data = %v, want %v", r.Data, want)
	}
	if want := map[string]cache.Quota{"b": {Bytes: 1 << 30, Keep: 720 * time.Hour}, "c": {Bytes: 2 << 30, Keep: 24 * time.Hour}}; !maps.Equal(r.Caches, want) {
		t.Errorf("caches = %v, want %v", r.Caches, want)
	}
}

// What a pool says of its boxes replaces what [box] says, key by key.
func TestConfigBoxes(t *testing.T) {
	c, err := readText(t, "[box]\nimage = \"base\"\nallow = [\"a/*\"]\ncaps = [\"CHOWN\"]\n[roles.staff]\nimages = [\"**\"]\n"+
		"[pools.plain]\n[pools.own]\nimage = \"other\"\n[pools.none]\nimage = \"\"\nallow = []\nstrict = true\ncaps = []\nengine = \"bwrap\"\nkeep_going = true\nstrict_arch = true\n")
	if err != nil {
		t.Fatal(err)
	}
	r, roles := c.rules(), map[string][]string{"staff": {"**"}}
	got := r.boxes([]string{"plain", "own", "none", "unknown"})
	for pool, want := range map[string]box.Rules{
		"plain": {Images: job.Images{Default: "base", Allow: []string{"a/*"}, Roles: roles, Table: "[box]"}, Caps: []string{"CHOWN"}},
		"own":   {Images: job.Images{Default: "other", Allow: []string{"a/*"}, Roles: roles, Table: "[box]"}, Caps: []string{"CHOWN"}},
		"none":  {Images: job.Images{Allow: []string{}, Roles: roles, Table: "[pools.none]"}, Strict: true, Caps: []string{}},
	} {
		if !reflect.DeepEqual(*got[pool], want) {
			t.Errorf("pool %s: %+v, want %+v", pool, *got[pool], want)
		}
	}
	if got["unknown"] != got["plain"] {
		t.Error("pools without rules of their own do not share those of [box], nor warm boxes")
	}
	if asks := c.asks(); asks["plain"] != (sshd.Rules{}) || asks["none"] != (sshd.Rules{Engine: "bwrap", KeepGoing: true, StrictArch: true}) {
		t.Errorf("asks = %+v", asks)
	}
	for first, want := range map[string]bool{"plain": true, "none": false} {
		r.Engine = "docker"
		if got := r.containers(t.Context(), []string{first, "own"}, t.Logf); got != want {
			t.Errorf("with the first pool %s: containers = %v, want %v", first, got, want)
		}
	}
}
