package profile

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     Profile
		notes    int
	}{
		{"empty", "", Profile{}, 0},
		{"what RAI makes when there is none", "profile:\n", Profile{}, 0},
		{"RAI's", "profile:\n  firstname: Ada\n  lastname: Lovelace\n  username: ada\n  email: ada@example.edu\n  access_key: AAAA\n  secret_key: BBBB\n  affiliation: uiuc\n  role: student\n  team:\n    name: team7\n  dockerhub:\n    username: u\n    password: p\n",
			Profile{FirstName: "Ada", LastName: "Lovelace", Username: "ada", Email: "ada@example.edu", Affiliation: "uiuc", Role: "student", Team: Team{"team7"}, DockerHub: Account{"u", "p"}}, 1},
		{"ours", "profile:\n  username: ada\n  server: rai@127.0.0.1:2222\n  key: ada\n  host_key: ssh-ed25519 AAAA\n",
			Profile{Username: "ada", Server: "rai@127.0.0.1:2222", Key: "ada", HostKey: "ssh-ed25519 AAAA"}, 0},
		{"CRLF and a comment", "# mine\r\nprofile:\r\n  username: ada # me\r\n", Profile{Username: "ada"}, 0},
	} {
		got, notes, err := Parse([]byte(c.in))
		if err != nil || !reflect.DeepEqual(*got, c.want) || len(notes) != c.notes {
			t.Errorf("%s: Parse = %+v, %q, %v, want %+v", c.name, got, notes, err, c.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, c := range []struct{ in, want, not string }{
		{"profile:\n  usernam: ada\n", "line 2, column 3", ""},
		{"profile:\n  usernam: ada\n", "   2 |   usernam: ada\n         ^", ""},
		{"profile:\n\tusername: ada\n", "tabs are not allowed", ""},
		{"profile:\n  team: [1, 2]\n", "line 2", ""},
		{"profile:\n  dockerhub:\n    pasword: hunter2\n    password: [hunter2]\n", "line", "\x1b"},
		{"profile:\n  dockerhub:\n    password: [hunter2]\n", "line 3", "hunter2"},
		{"profile:\n  secret_key: {a: hunter2}\n", "line 2", "hunter2"},
		{"profile:\n  x\x1b[2J: 1\n", "", "\x1b"},
		{"export RAI_USER_NAME='ada'\nRAI_SECRET_KEY=hunter2\n", "RAI's form of 2016", "hunter2"},
		{strings.Repeat("a", maxSize+1), "too many", ""},
	} {
		_, _, err := Parse([]byte(c.in))
		if err == nil || !strings.Contains(err.Error(), c.want) || c.not != "" && strings.Contains(err.Error(), c.not) {
			t.Errorf("Parse(%.60q) = %v, want %q in it and %q not", c.in, err, c.want, c.not)
		}
	}
}

func TestWriteAndFind(t *testing.T) {
	home := t.TempDir()
	if _, _, err := Find(home); !errors.Is(err, ErrNone) {
		t.Errorf("Find in an empty folder = %v, want ErrNone", err)
	}
	p := &Profile{Username: "ada", FirstName: `O'Neil: "x" # y`, Role: "student", Server: "rai@h:1", Key: "ada", HostKey: "ssh-ed25519 AAAA", SecretKey: "never"}
	if err := p.Write(filepath.Join(home, ".rai.env")); err != nil {
		t.Fatal(err)
	}
	got, _, err := Find(home)
	if err != nil {
		t.Fatal(err)
	}
	want := *p
	want.SecretKey, want.path = "", filepath.Join(home, ".rai.env")
	if !reflect.DeepEqual(*got, want) {
		t.Errorf("Find = %+v, want %+v", *got, want)
	}
	if info, _ := os.Stat(got.path); info.Mode().Perm() != 0o600 && filepath.Separator == '/' {
		t.Errorf("the profile's mode is %v, want 0600", info.Mode())
	}
	p.Username = "first"
	p.Write(filepath.Join(home, ".rai_profile"))
	if got, _, err := Find(home); err != nil || got.Username != "first" {
		t.Errorf("Find = %+v, %v, want the one in .rai_profile", got, err)
	}
}

func TestKeyFile(t *testing.T) {
	home, dir := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("USERPROFILE", home)
	os.Mkdir(filepath.Join(home, ".ssh"), 0o700)
	for _, f := range []string{filepath.Join(home, ".ssh", "bob"), filepath.Join(dir, "ada"), filepath.Join(home, "k")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ key, want string }{
		{"", ""},
		{"ada", filepath.Join(dir, "ada")},
		{"~/k", filepath.Join(home, "k")},
		{filepath.Join(home, "k"), filepath.Join(home, "k")},
		{"/elsewhere/KEYS/ada", filepath.Join(dir, "ada")},
		{"/elsewhere/KEYS/bob", filepath.Join(home, ".ssh", "bob")},
		{"/elsewhere/none", "/elsewhere/none"},
	} {
		p := Profile{Key: c.key, path: filepath.Join(dir, "p")}
		if got := p.KeyFile(); got != c.want {
			t.Errorf("KeyFile of %q = %q, want %q", c.key, got, c.want)
		}
	}
}

// FuzzProfile holds that no text crashes the reader, that errors are fit for a
// terminal, and that what was read survives being written.
func FuzzProfile(f *testing.F) {
	f.Add([]byte("profile:\n  username: ada\n  team: {name: t}\n"))
	f.Add([]byte("profile: &a\n  username: *a\n"))
	f.Add([]byte("profile:\n\tx: 1\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, _, err := Parse(text)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\x1b\r\x00") {
				t.Errorf("Parse(%q) = %q: control characters", text, err)
			}
			return
		}
		b, err := p.Marshal()
		if err != nil {
			t.Fatalf("Marshal of what Parse(%q) read: %v", text, err)
		}
		q, _, err := Parse(b)
		if err != nil || !reflect.DeepEqual(p, q) {
			t.Errorf("Parse(Marshal(%+v)) = %+v, %v\n%s", p, q, err, b)
		}
	})
}

func TestAccount(t *testing.T) {
	p := Profile{DockerHub: Account{"ada", "hub"}, Registries: map[string]Account{"r.example.edu:5000": {"ada", "own"}, "half.example.edu": {Username: "ada"}}}
	for registry, want := range map[string]string{"docker.io": "hub", "index.docker.io": "hub", "r.example.edu:5000": "own", "r.example.edu": "", "half.example.edu": "", "": ""} {
		if a, ok := p.Account(registry); ok != (want != "") || ok && a.Password != want {
			t.Errorf("Account(%q) = %v, %v, want the password %q", registry, a, ok, want)
		}
	}
	if b, err := p.Marshal(); err != nil || strings.Contains(string(b), "own") || strings.Contains(string(b), "hub") {
		t.Errorf("a profile is written with passwords: %s, %v", b, err)
	}
}
