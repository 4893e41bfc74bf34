// Package profile reads and writes ~/.rai_profile, the one file a student needs: who
// they are, where raid is, which key is theirs and what raid's own key looks like.
//
// The form is RAI's, so an old profile still reads; RAI's access_key and secret_key
// mean nothing any more and are passed over with a note. Four names are new:
//
//	profile:
//	  username: ada
//	  email: ada@example.edu
//	  role: student
//	  team:
//	    name: team7
//	  server: rai@gpu.example.edu:2222
//	  key: /home/ada/.ssh/rai
//	  host_key: ssh-ed25519 AAAA…
//	  dockerhub: {username: ada, password: "age:…"}
//	  registries:
//	    registry.example.edu: {username: ada, password: "age:…"}
//
// A name that is not known is an error with its line and a caret: a typo must not
// become a default. No secret ever stands in a profile that this package writes, and
// none is quoted in an error.
package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/rai-project/raid/keys"
)

// A Profile is what the file says. Only Server is needed to reach raid.
type Profile struct {
	FirstName   string  `yaml:"firstname,omitempty"`
	LastName    string  `yaml:"lastname,omitempty"`
	Username    string  `yaml:"username,omitempty"`
	Email       string  `yaml:"email,omitempty"`
	Affiliation string  `yaml:"affiliation,omitempty"`
	Role        string  `yaml:"role,omitempty"`
	Team        Team    `yaml:"team,omitempty"`
	DockerHub   Account `yaml:"dockerhub,omitempty"`
	Server      string  `yaml:"server,omitempty"`   // as dial.Parse reads it
	Key         string  `yaml:"key,omitempty"`      // the private key's file; see KeyFile
	HostKey     string  `yaml:"host_key,omitempty"` // raid's public key, authorized_keys form

	// Registries are the accounts on others than Docker Hub, by host or host:port.
	Registries map[string]Account `yaml:"registries,omitempty"`

	AccessKey string `yaml:"access_key,omitempty"` // RAI's, without meaning; never written
	SecretKey string `yaml:"secret_key,omitempty"` // likewise

	path string // where it was read
}

// Team is a profile's team.
type Team struct {
	Name string `yaml:"name,omitempty"`
}

// An Account is one that a build file's push may use which brings no credentials.
type Account struct {
	Username string `yaml:"username,omitempty"`
	Password string `yaml:"password,omitempty"` // may be encrypted: rai-crypto encrypt --push
}

// Account returns the account on a registry, "docker.io" for Docker Hub. ok is false if
// there is none.
func (p *Profile) Account(registry string) (a Account, ok bool) {
	a, ok = p.Registries[registry]
	if !ok && (registry == "docker.io" || registry == "index.docker.io") {
		a = p.DockerHub
	}
	return a, a.Username != "" && a.Password != ""
}

// Exposed reports whether others than its owner may read the file it came from.
func (p *Profile) Exposed() bool {
	i, err := os.Stat(p.path)
	return err == nil && i.Mode().Perm()&0o077 != 0 && runtime.GOOS != "windows"
}

// maxSize bounds a profile. Nobody needs more, and the YAML library takes quadratic time
// for deep nesting: 20 s for 60 KiB of "[".
const maxSize = 8 << 10

// Names returns the files that are looked for in a home folder, in order, as RAI did.
func Names() []string {
	return []string{".rai_profile", ".rai_env", ".rai.profile", ".rai.env"}
}

// ErrNone is returned by Find when there is no profile.
var ErrNone = errors.New("no profile")

// Find reads the first profile in the home folder. The error is ErrNone, wrapped, if
// there is none.
func Find(home string) (*Profile, []string, error) {
	for _, n := range Names() {
		path := filepath.Join(home, n)
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.IsDir() {
			continue
		}
		return Read(path)
	}
	return nil, nil, fmt.Errorf("%w: no %s in %s", ErrNone, strings.Join(Names(), ", "), home)
}

// Read reads the profile at path. Notes say what was passed over.
func Read(path string) (p *Profile, notes []string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read profile: %w", err)
	}
	if info.Size() > maxSize {
		return nil, nil, fmt.Errorf("read profile %s: %d bytes are too many for a profile", path, info.Size())
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read profile: %w", err)
	}
	p, notes, err = Parse(text)
	if err != nil {
		return nil, nil, fmt.Errorf("profile %s: %w", path, err)
	}
	p.path = path
	return p, notes, nil
}

// Parse reads the text of a profile. An empty one is a profile that says nothing.
func Parse(text []byte) (*Profile, []string, error) {
	if len(text) > maxSize {
		return nil, nil, fmt.Errorf("%d bytes are too many for a profile", len(text))
	}
	if isEnv(text) {
		return nil, nil, errors.New("this is RAI's form of 2016 (RAI_USER_NAME=…); write it as YAML:\nprofile:\n  username: …\n  server: …")
	}
	var file struct {
		Profile *Profile `yaml:"profile"`
	}
	if err := yaml.UnmarshalWithOptions(text, &file, yaml.Strict()); err != nil && strings.TrimSpace(string(text)) != "" {
		return nil, nil, place(text, err)
	}
	p := file.Profile
	if p == nil {
		p = new(Profile)
	}
	var notes []string
	if p.AccessKey != "" || p.SecretKey != "" {
		notes = append(notes, "access_key and secret_key are RAI's and mean nothing here; raid knows you by your SSH key")
	}
	p.AccessKey, p.SecretKey = "", ""
	return p, notes, nil
}

// isEnv recognises the shell-style profiles of 2016.
func isEnv(text []byte) bool {
	for line := range strings.Lines(string(text)) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		if name, _, ok := strings.Cut(line, "="); ok && strings.HasPrefix(name, "RAI_") && !strings.ContainsAny(name, ": ") {
			return true
		}
	}
	return false
}

// place turns an error of the YAML library into one with its line and a caret, and
// leaves secrets out.
func place(text []byte, err error) error {
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil || at.GetToken().Position == nil {
		return errors.New(printable(err.Error()))
	}
	pos := at.GetToken().Position
	lines := strings.Split(string(text), "\n")
	n := min(max(pos.Line, 1), len(lines))
	line := []rune(strings.TrimRight(lines[n-1], "\r"))
	col := min(max(pos.Column, 1), len(line)+1)
	message, lead := at.GetMessage(), fmt.Sprintf("%4d | ", n)
	if lower := strings.ToLower(string(line)); strings.Contains(lower, "password") || strings.Contains(lower, "_key") {
		// A library message quotes the value at times; this line's is a secret.
		return fmt.Errorf("line %d, column %d: %s", n, col, "this value cannot be read")
	}
	if strings.Contains(string(line), "\t") {
		message = "tabs are not allowed for indentation; use spaces"
	}
	shown := strings.ReplaceAll(string(line), "\t", " ")
	return fmt.Errorf("line %d, column %d: %s\n%s%s\n%s^", n, col, printable(message), lead, printable(shown), strings.Repeat(" ", len(lead)+col-1))
}

// printable shows control characters as Go does, so that a file somebody sent cannot
// drive a terminal.
func printable(s string) string {
	q := strconv.Quote(s)
	q = q[1 : len(q)-1]
	q = strings.ReplaceAll(q, `\"`, `"`)
	return strings.ReplaceAll(q, `\n`, "\n")
}

// KeyFile returns where the private key is, or "" if the profile names none. "~" is
// the home folder and a relative name lies beside the profile. A profile travels with
// its key, by mail or on a stick, so if the named file is not there one of the same
// name beside the profile or in ~/.ssh will do.
func (p *Profile) KeyFile() string {
	if p.Key == "" {
		return ""
	}
	home, _ := os.UserHomeDir()
	dir := filepath.Dir(p.path)
	file := p.Key
	if rest, ok := strings.CutPrefix(filepath.ToSlash(file), "~/"); ok {
		file = filepath.Join(home, rest)
	} else if !filepath.IsAbs(file) {
		file = filepath.Join(dir, file)
	}
	base := filepath.Base(filepath.FromSlash(p.Key))
	for _, f := range []string{file, filepath.Join(dir, base), filepath.Join(home, ".ssh", base)} {
		if info, err := os.Stat(f); err == nil && info.Mode().IsRegular() {
			return f
		}
	}
	return file
}

// Marshal returns the profile as YAML, without RAI's two keys and without accounts.
func (p *Profile) Marshal() ([]byte, error) {
	q := *p
	q.AccessKey, q.SecretKey = "", ""
	q.DockerHub, q.Registries = Account{}, nil
	b, err := yaml.Marshal(struct {
		Profile Profile `yaml:"profile"`
	}{q})
	if err != nil {
		return nil, fmt.Errorf("write profile: %w", err)
	}
	return b, nil
}

// Write writes the profile to path (0600), replacing what is there.
func (p *Profile) Write(path string) error {
	b, err := p.Marshal()
	if err != nil {
		return err
	}
	return keys.WriteFile(path, b, 0o600)
}
