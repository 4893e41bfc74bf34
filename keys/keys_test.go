package keys

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// line returns a new public key in authorized_keys form.
func line(t testing.TB, comment string) string {
	t.Helper()
	_, l, err := NewKey(comment)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func parse(t testing.TB, l string) ssh.PublicKey {
	t.Helper()
	k, _, _, _, err := ssh.ParseAuthorizedKey([]byte(l))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// enroll puts e into b and fails the test if that is refused.
func enroll(t testing.TB, b *Book, e Enrollment) (User, Key) {
	t.Helper()
	u, k, err := b.Check(e)
	if err != nil {
		t.Fatalf("Check(%+v) = %v", e, err)
	}
	b.Apply(u, k)
	return u, k
}

func ada(key string) Enrollment {
	return Enrollment{User: "ada", Email: "ada@example.edu", Role: Student, Team: "team7", Key: key}
}

func TestAtLeast(t *testing.T) {
	for _, c := range []struct {
		r, min Role
		want   bool
	}{
		{Admin, Staff, true}, {Staff, Staff, true}, {Power, Staff, false}, {Student, Guest, true},
		{Guest, Student, false}, {Guest, Guest, true}, {"ece408", Student, true}, {"ece408", Power, false},
		{Runner, Guest, false}, {Runner, Runner, true}, {Admin, Runner, false}, {"", Guest, false}, {"", "", false}, {Admin, "", false},
	} {
		if got := c.r.AtLeast(c.min); got != c.want {
			t.Errorf("%q.AtLeast(%q) = %v, want %v", c.r, c.min, got, c.want)
		}
	}
}

func TestMayEnroll(t *testing.T) {
	for _, c := range []struct {
		by, was, will Role
		want          bool
	}{
		{Admin, "", Admin, true}, {Admin, Admin, Student, true}, {Admin, "", Runner, true},
		{Staff, "", Student, true}, {Staff, Student, Power, true},
		{Staff, "", Staff, false}, {Staff, "", Admin, false}, {Staff, Admin, Student, false},
		{Staff, Staff, Staff, false}, {Staff, "", Runner, false}, {Staff, Runner, Runner, false},
		{Power, "", Student, false}, {Student, Student, Student, false}, {Runner, "", Runner, false}, {"", "", Student, false},
	} {
		if got := c.by.MayEnroll(c.was, c.will); got != c.want {
			t.Errorf("%q.MayEnroll(%q, %q) = %v, want %v", c.by, c.was, c.will, got, c.want)
		}
	}
}

func TestWho(t *testing.T) {
	var b Book
	home, away := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.7")
	l := line(t, "")
	if id, ok := b.Who(parse(t, l), home); ok {
		t.Errorf("Who in an empty book = %+v, want nobody", id)
	}
	u, k := enroll(t, &b, ada(l))
	want := Identity{User: "ada", Role: Student, Team: "team7", Fingerprint: ssh.FingerprintSHA256(parse(t, l))}
	if id, ok := b.Who(parse(t, l), away); !ok || id != want {
		t.Errorf("Who = %+v, %v, want %+v", id, ok, want)
	}
	k.LoopbackOnly = true
	b.Apply(u, k)
	for _, c := range []struct {
		from string
		want bool
	}{{"127.0.0.1", true}, {"127.9.9.9", true}, {"::1", true}, {"::ffff:127.0.0.1", true}, {"192.0.2.7", false}, {"::ffff:192.0.2.7", false}, {"fe80::1", false}} {
		if _, ok := b.Who(parse(t, l), netip.MustParseAddr(c.from)); ok != c.want {
			t.Errorf("Who of a loopback key from %s = %v, want %v", c.from, ok, c.want)
		}
	}
	if _, ok := b.Who(parse(t, l), netip.Addr{}); ok {
		t.Error("Who of a loopback key from nowhere: let in")
	}
	b.Load(nil, []Key{k})
	if _, ok := b.Who(parse(t, l), home); ok {
		t.Error("Who of a key whose user is gone: let in")
	}
	b.Load([]User{u}, []Key{k})
	b.Remove(k.Fingerprint)
	if _, ok := b.Who(parse(t, l), home); ok {
		t.Error("Who of a removed key: let in")
	}
}

// A certificate must not be taken for the key in it.
func TestWhoCertificate(t *testing.T) {
	var b Book
	l := line(t, "")
	enroll(t, &b, ada(l))
	_, ca, _ := ed25519.GenerateKey(rand.Reader)
	signer, err := ssh.NewSignerFromKey(ca)
	if err != nil {
		t.Fatal(err)
	}
	cert := &ssh.Certificate{Key: parse(t, l), CertType: ssh.UserCert, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, signer); err != nil {
		t.Fatal(err)
	}
	if id, ok := b.Who(cert, netip.MustParseAddr("127.0.0.1")); ok {
		t.Errorf("Who of a certificate = %+v, want nobody", id)
	}
	e := ada(string(ssh.MarshalAuthorizedKey(cert)))
	if _, _, err := b.Check(e); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("Check of a certificate = %v, want it refused", err)
	}
}

func TestCheckRefuses(t *testing.T) {
	var b Book
	taken := line(t, "")
	enroll(t, &b, Enrollment{User: "bob", Email: "bob@example.edu", Role: Student, Key: taken})
	enroll(t, &b, Enrollment{User: "box", Role: Runner, Key: line(t, "")})
	good := line(t, "")
	rsaLine := func(bits int) string {
		n := new(big.Int).SetBit(big.NewInt(1), bits-1, 1) // nobody signs with it
		p, err := ssh.NewPublicKey(&rsa.PublicKey{N: n, E: 65537})
		if err != nil {
			t.Fatal(err)
		}
		return string(ssh.MarshalAuthorizedKey(p))
	}
	private, _, _ := NewKey("")
	for _, c := range []struct {
		name string
		edit func(*Enrollment)
		want string
	}{
		{"no user", func(e *Enrollment) { e.User = "" }, "bad user name"},
		{"dot first", func(e *Enrollment) { e.User = "../x" }, "bad user name"},
		{"slash", func(e *Enrollment) { e.User = "a/b" }, "bad user name"},
		{"newline", func(e *Enrollment) { e.User = "a\nb" }, "bad user name"},
		{"33 letters", func(e *Enrollment) { e.User = strings.Repeat("a", 33) }, "bad user name"},
		{"no role", func(e *Enrollment) { e.Role = "" }, "empty role"},
		{"unknown role", func(e *Enrollment) { e.Role = "king" }, "student, power, staff, admin, runner"},
		{"guest", func(e *Enrollment) { e.Role = Guest }, "not valid"},
		{"no mail", func(e *Enrollment) { e.Email = "" }, "empty email"},
		{"no at", func(e *Enrollment) { e.Email = "ada" }, "bad e-mail"},
		{"header in mail", func(e *Enrollment) { e.Email = "a@b\r\nBcc: x@y" }, "bad e-mail"},
		{"two mails", func(e *Enrollment) { e.Email = "a@b,c@d" }, "bad e-mail"},
		{"team", func(e *Enrollment) { e.Team = "a b" }, "bad team"},
		{"team escape", func(e *Enrollment) { e.Team = "\x1b[2J" }, "bad team"},
		{"name escape", func(e *Enrollment) { e.First = "A\x1b[2J" }, "bad first name"},
		{"bidi name", func(e *Enrollment) { e.Last = "a\u202eb" }, "bad last name"},
		{"long affiliation", func(e *Enrollment) { e.Affiliation = strings.Repeat("a", 129) }, "bad affiliation"},
		{"no key", func(e *Enrollment) { e.Key = " " }, "no public key"},
		{"no key at all", func(e *Enrollment) { e.Key = "hello" }, "not a public key"},
		{"two keys", func(e *Enrollment) { e.Key = good + "\n" + taken }, "more than one"},
		{"private", func(e *Enrollment) { e.Key = string(private) }, "private key"},
		{"putty", func(e *Enrollment) { e.Key = "---- BEGIN SSH2 PUBLIC KEY ----\nx" }, "RFC 4716"},
		{"options", func(e *Enrollment) { e.Key = `command="sh" ` + good }, "options"},
		{"restrict", func(e *Enrollment) { e.Key = `restrict ` + good }, "options"},
		{"short RSA", func(e *Enrollment) { e.Key = rsaLine(2048) }, "2048 bits"},
		{"another's key", func(e *Enrollment) { e.Key = taken }, "somebody else's"},
		{"a machine's name", func(e *Enrollment) { e.User = "box" }, "machine"},
		{"a person's name", func(e *Enrollment) { e.User, e.Role = "bob", Runner }, "machine"},
	} {
		e := ada(good)
		c.edit(&e)
		u, k, err := b.Check(e)
		var r *RefusedError
		if !errors.As(err, &r) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: Check = %+v, %+v, %v, want a refusal with %q", c.name, u, k, err, c.want)
		}
	}
	if _, _, err := b.Check(ada(rsaLine(3072))); err != nil {
		t.Errorf("Check of an RSA key of 3072 bits = %v", err)
	}
	if n := len(b.Users()); n != 2 {
		t.Errorf("Check changed the book: %d users, want 2", n)
	}
}

func TestEnrollAgain(t *testing.T) {
	b := Book{Extra: []Role{"ece408"}}
	first, second := line(t, "laptop"), line(t, "lab\x1b[2J")
	u1, k1 := enroll(t, &b, Enrollment{User: " Ada ", Email: "ada@example.edu", Role: "STUDENT", Team: "Team7", First: "Ada", Key: first})
	if u1.Name != "ada" || u1.Role != Student || u1.Team != "team7" || k1.Comment != "laptop" || k1.Line != first {
		t.Errorf("enrolled %+v with %+v", u1, k1)
	}
	u2, k2 := enroll(t, &b, Enrollment{User: "ada", Role: "ece408", Last: "Lovelace", Team: "-", Key: second})
	want := u1
	want.Role, want.Last, want.Team = "ece408", "Lovelace", ""
	if u2 != want {
		t.Errorf("updated user = %+v, want %+v", u2, want)
	}
	if strings.Contains(k2.Line+k2.Comment, "\x1b") {
		t.Errorf("a control character stayed in %q", k2.Line)
	}
	if got := b.Keys("ada"); len(got) != 2 {
		t.Errorf("Keys = %+v, want two", got)
	}
	// A key that is only good from loopback stays so, however often it is enrolled.
	k1.LoopbackOnly = true
	b.Apply(u2, k1)
	_, again := enroll(t, &b, Enrollment{User: "ada", Key: first})
	if !reflect.DeepEqual(again, k1) {
		t.Errorf("the same key again = %+v, want %+v", again, k1)
	}
	if len(b.Keys("ada")) != 2 || len(b.Users()) != 1 || len(b.Keys("bob")) != 0 {
		t.Errorf("the book holds %v and %v", b.Users(), b.Keys("ada"))
	}
}

func TestClean(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{" ada@laptop ", "ada@laptop"}, {"a\x1b[2Jb", "a_[2Jb"}, {"a\u202eb", "a_b"}, {"José", "José"}, {"\xff", "_"},
		{strings.Repeat("é", 99), strings.Repeat("é", 64)},
	} {
		if got := Clean(c.in); got != c.want {
			t.Errorf("Clean(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

func TestKeyFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ada")
	private, public, err := NewKey("ada")
	if err != nil {
		t.Fatal(err)
	}
	if err := WriteKey(path, private, public); err != nil {
		t.Fatal(err)
	}
	s, err := LoadSigner(path, nil)
	if err != nil || !bytes.Equal(s.PublicKey().Marshal(), parse(t, public).Marshal()) {
		t.Fatalf("LoadSigner = %v, want the key that was written", err)
	}
	if err := WriteKey(path, []byte("other"), "other"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("WriteKey over a key = %v, want ErrExist", err)
	}
	if b, _ := os.ReadFile(path); !bytes.Equal(b, private) {
		t.Error("WriteKey destroyed a key")
	}
	if b, _ := os.ReadFile(path + ".pub"); string(b) != public+"\n" {
		t.Errorf("%s.pub = %q, want %q", path, b, public)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".rai-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	var r *RefusedError
	if _, err := LoadSigner(path+".pub", nil); !errors.As(err, &r) {
		t.Errorf("LoadSigner of a public key = %v, want a refusal", err)
	}
	if runtime.GOOS == "windows" {
		return
	}
	for f, want := range map[string]fs.FileMode{path: 0o600, path + ".pub": 0o644} {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %v", f, info.Mode(), err, want)
		}
	}
	for _, m := range []fs.FileMode{0o640, 0o604, 0o620} {
		os.Chmod(path, m)
		if _, err := LoadSigner(path, nil); !errors.As(err, &r) || !strings.Contains(r.Hint, "chmod 600") {
			t.Errorf("LoadSigner with mode %o = %v, want a refusal", m, err)
		}
	}
}

func TestPassphrase(t *testing.T) {
	_, priv, _ := ed25519.GenerateKey(rand.Reader)
	block, err := ssh.MarshalPrivateKeyWithPassphrase(priv, "", []byte("open"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "k")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		answers []string
		ok      bool
	}{{[]string{"no", "open"}, true}, {[]string{"no", "no", "no", "open"}, false}} {
		n := 0
		_, err := LoadSigner(path, func(string) ([]byte, error) { n++; return []byte(c.answers[n-1]), nil })
		if (err == nil) != c.ok {
			t.Errorf("LoadSigner with %q = %v, want success %v", c.answers, err, c.ok)
		}
	}
	var r *RefusedError
	if _, err := LoadSigner(path, nil); !errors.As(err, &r) || !strings.Contains(r.Hint, "ssh-add") {
		t.Errorf("LoadSigner with nobody to ask = %v, want a hint", err)
	}
}

// FuzzEnrollment holds that whatever is accepted is fit to be printed, stored, and
// enrolled once more.
func FuzzEnrollment(f *testing.F) {
	key := line(f, "c")
	f.Add("ada", "ada@example.edu", "student", "t", "Ada", "L", "uiuc", key)
	f.Add("", "", "", "-", "\x00", "", "", `command="x" `+key)
	f.Fuzz(func(t *testing.T, user, email, role, team, first, last, aff, k string) {
		var b Book
		e := Enrollment{user, email, Role(role), team, first, last, aff, k, false}
		u, key, err := b.Check(e)
		if err != nil {
			var r *RefusedError
			if !errors.As(err, &r) || strings.ContainsAny(r.Why+r.Hint, "\x1b\r\n\x00") {
				t.Errorf("Check(%+v) = %q", e, err)
			}
			return
		}
		if !nameForm.MatchString(u.Name) || !(u.Role.AtLeast(Student) || u.Role == Runner) {
			t.Errorf("Check(%+v) let %+v in", e, u)
		}
		for _, s := range []string{u.Email, u.First, u.Last, u.Team, u.Affiliation, key.Line, key.Comment} {
			if strings.ContainsFunc(s, unprintable) {
				t.Errorf("Check(%+v) kept %q", e, s)
			}
		}
		b.Apply(u, key)
		if u2, k2, err := b.Check(Enrollment{User: u.Name, Key: key.Line}); err != nil || u2 != u || k2 != key {
			t.Errorf("enrolled again: %+v %+v %v, want %+v %+v", u2, k2, err, u, key)
		}
		if got := ssh.FingerprintSHA256(parse(t, key.Line)); got != key.Fingerprint {
			t.Errorf("fingerprint of %q = %s, want %s", key.Line, got, key.Fingerprint)
		}
	})
}
