package keys

import (
	"crypto/rsa"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/ssh"
)

// An Enrollment asks for a user to be made or updated and for a key to be theirs.
// It is one line of what `admin enroll` reads. For a user who exists, an empty field
// leaves things as they are; a team of "-" takes the user out of their team.
type Enrollment struct {
	User        string `json:"user"`
	Email       string `json:"email,omitempty"`
	Role        Role   `json:"role,omitempty"`
	Team        string `json:"team,omitempty"`
	First       string `json:"firstname,omitempty"`
	Last        string `json:"lastname,omitempty"`
	Affiliation string `json:"affiliation,omitempty"`
	Key         string `json:"key"` // one line in authorized_keys form
	// LoopbackOnly makes the key count from 127.0.0.0/8 and ::1 only. Enrolling it again
	// never lifts that.
	LoopbackOnly bool `json:"loopback_only,omitempty"`
}

// A RefusedError says why an enrolment or a key file is not taken, and what to do
// about it. Both texts are safe to print on a terminal.
type RefusedError struct {
	Why  string
	Hint string // may be ""
}

func (e *RefusedError) Error() string { return e.Why }

func refuse(hint, format string, args ...any) error {
	return &RefusedError{Why: fmt.Sprintf(format, args...), Hint: hint}
}

// Limits of what is kept about a user.
const (
	maxText    = 128 // runes of a name or an affiliation
	maxEmail   = 254 // RFC 5321 §4.5.3.1.3, less the angle brackets
	maxComment = 64
	maxLine    = 16 << 10 // an RSA key of 16384 bits is under 3 KiB
	minRSA     = 3072     // NIST SP 800-57: good after 2030
	maxRSA     = 16384
)

var (
	nameForm  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,31}$`)
	emailForm = regexp.MustCompile(`^[A-Za-z0-9.!#$%&'*+/=?^_{|}~-]+@[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$`)
)

// ValidName reports whether s may name a user: 1 to 32 of a-z 0-9 . _ -, beginning
// with a letter or a digit. Such a name is also a safe file name.
func ValidName(s string) bool { return nameForm.MatchString(s) }

// Roles returns the roles that may be enrolled, the extra ones last.
func (b *Book) Roles() []Role {
	return append([]Role{Student, Power, Staff, Admin, Runner}, b.Extra...)
}

// Check says what the book would hold after e and changes nothing. The error is a
// *RefusedError. The caller decides whether it may (see [Role.MayEnroll]), commits
// both rows, then calls Apply.
func (b *Book) Check(e Enrollment) (User, Key, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	now := time.Now().UTC().Truncate(time.Millisecond)
	u, err := b.checkUser(e, now)
	if err != nil {
		return User{}, Key{}, err
	}
	k, err := ParseKey(e.Key)
	if err != nil {
		return User{}, Key{}, err
	}
	k.User, k.Added, k.LoopbackOnly = u.Name, now, e.LoopbackOnly
	if have, ok := b.keys[k.Fingerprint]; ok {
		if have.User != u.Name {
			return User{}, Key{}, refuse("every person needs a key of their own: ssh-keygen -t ed25519",
				"the key %s is already somebody else's", k.Fingerprint)
		}
		k.Added, k.LoopbackOnly = have.Added, have.LoopbackOnly || e.LoopbackOnly
	}
	return u, k, nil
}

// checkUser merges e into the user it names, or into a new one.
func (b *Book) checkUser(e Enrollment, now time.Time) (User, error) {
	name := strings.ToLower(strings.TrimSpace(e.User))
	if !ValidName(name) {
		return User{}, refuse("use 1 to 32 of a-z 0-9 . _ -, beginning with a letter or a digit", "bad user name %q", clip(e.User))
	}
	u, old := b.users[name]
	if !old {
		u = User{Name: name, Created: now}
	}
	role, err := b.checkRole(Role(strings.ToLower(strings.TrimSpace(string(e.Role)))), u.Role)
	if err != nil {
		return User{}, err
	}
	if old && (role == Runner) != (u.Role == Runner) {
		return User{}, refuse("use another user name", "%s is a %s; a machine's name cannot become a person's, nor the other way", name, u.Role)
	}
	u.Role = role
	if u.Team, err = checkTeam(e.Team, u.Team); err != nil {
		return User{}, err
	}
	if u.Email, err = checkEmail(e.Email, u.Email, role); err != nil {
		return User{}, err
	}
	for _, f := range []struct {
		what, text string
		into       *string
	}{{"first name", e.First, &u.First}, {"last name", e.Last, &u.Last}, {"affiliation", e.Affiliation, &u.Affiliation}} {
		if *f.into, err = checkText(f.what, f.text, *f.into); err != nil {
			return User{}, err
		}
	}
	return u, nil
}

func (b *Book) checkRole(r, was Role) (Role, error) {
	if r == "" && was != "" {
		return was, nil
	}
	valid := b.Roles()
	if slices.Contains(valid, r) {
		return r, nil
	}
	var list []string
	for _, v := range valid {
		list = append(list, string(v))
	}
	hint := "valid roles are " + strings.Join(list, ", ")
	if r == "" {
		return "", refuse(hint, "empty role")
	}
	return "", refuse(hint, "the role %q is not valid; %s", clip(string(r)), hint)
}

func checkTeam(team, was string) (string, error) {
	switch team = strings.ToLower(strings.TrimSpace(team)); {
	case team == "":
		return was, nil
	case team == "-":
		return "", nil
	case !nameForm.MatchString(team):
		return "", refuse("use 1 to 32 of a-z 0-9 . _ -", "bad team name %q", clip(team))
	}
	return team, nil
}

// checkEmail wants an address for people, since their results may be mailed.
func checkEmail(email, was string, r Role) (string, error) {
	email = strings.TrimSpace(email)
	if email == "" {
		if was == "" && r != Runner && r != Admin {
			return "", refuse("give an e-mail address", "empty email")
		}
		return was, nil
	}
	if len(email) > maxEmail || !emailForm.MatchString(email) || strings.Contains(email, "..") {
		return "", refuse("it should look like ada@example.edu", "bad e-mail address %q", clip(email))
	}
	return email, nil
}

func checkText(what, s, was string) (string, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return was, nil
	}
	if !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxText || strings.ContainsFunc(s, unprintable) {
		return "", refuse(fmt.Sprintf("at most %d printable characters", maxText), "bad %s %q", what, clip(s))
	}
	return s, nil
}

// ParseKey reads one public key in authorized_keys form, as somebody would send it
// for enrolment. It sets Fingerprint, Line and Comment. The error is a *RefusedError.
func ParseKey(line string) (Key, error) {
	line = strings.TrimSpace(line)
	switch {
	case line == "":
		return Key{}, refuse("send the .pub file of the key", "no public key")
	case strings.HasPrefix(line, "-----BEGIN") && strings.Contains(line, "PRIVATE"):
		return Key{}, refuse("send the .pub file, and make a new key if this one has left your machine", "this is a private key")
	case strings.HasPrefix(line, "---- BEGIN"):
		return Key{}, refuse("convert it: ssh-keygen -i -f FILE", "this is a key in RFC 4716 form (PuTTY's)")
	case len(line) > maxLine || strings.ContainsAny(line, "\r\n"):
		return Key{}, refuse("send one line, as in the .pub file", "this is more than one public key")
	}
	pub, comment, options, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return Key{}, refuse("it should look like: ssh-ed25519 AAAA… comment", "this is not a public key")
	}
	if len(options) > 0 {
		return Key{}, refuse("send the key alone, beginning with its type", "options before a key (%q) are not taken", clip(options[0]))
	}
	if err := strong(pub); err != nil {
		return Key{}, err
	}
	k := Key{Fingerprint: ssh.FingerprintSHA256(pub), Comment: Clean(comment)}
	k.Line = authorized(pub, k.Comment)
	return k, nil
}

// authorized returns a key's line in authorized_keys form.
func authorized(pub ssh.PublicKey, comment string) string {
	return strings.TrimSpace(strings.TrimSpace(string(ssh.MarshalAuthorizedKey(pub))) + " " + comment)
}

// strong refuses keys that are no longer good enough to begin with.
func strong(pub ssh.PublicKey) error {
	const hint = "make one with: ssh-keygen -t ed25519"
	if _, ok := pub.(*ssh.Certificate); ok {
		return refuse("send the plain .pub file beside the -cert.pub", "this is a certificate, not a key")
	}
	switch pub.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
		ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return nil
	case ssh.KeyAlgoRSA:
		if c, ok := pub.(ssh.CryptoPublicKey); ok {
			if r, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok {
				return strongRSA(r.N.BitLen(), hint)
			}
		}
	}
	return refuse(hint, "keys of type %q are not taken", clip(pub.Type()))
}

func strongRSA(bits int, hint string) error {
	if bits < minRSA || bits > maxRSA {
		return refuse(hint, "this RSA key has %d bits; RSA keys need %d to %d", bits, minRSA, maxRSA)
	}
	return nil
}

// Clean makes a stranger's text fit for a terminal and a log line: at most 64
// printable characters, the others shown as "_".
func Clean(s string) string {
	out := []rune(strings.Map(func(r rune) rune {
		if unprintable(r) || r == utf8.RuneError {
			return '_'
		}
		return r
	}, strings.TrimSpace(s)))
	return string(out[:min(len(out), maxComment)])
}

// unprintable is true for control characters and also for the invisible ones that
// turn text around (U+202E and its kin); a space is printable.
func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// clip shortens what an error message quotes.
func clip(s string) string {
	if r := []rune(s); len(r) > maxComment {
		return string(r[:maxComment]) + "…"
	}
	return s
}
