package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/keys/profile"
)

func TestReadClass(t *testing.T) {
	in := "\ufeffLovelace, ADA, Ada, ada@example.edu, Student, University of Illinois\r\n" +
		"\"van der Berg\",o'neil-smith,bob,bob@example.edu,power,\"Inst, of X\"\r\n" +
		"\r\n" +
		"a,b,c\n" +
		"a;b;c;d;e;f\n" +
		"McDonald,eve,eve,,student,x\n" +
		"x,y,\"eve,e@x,student,x\n"
	rows, bad := readClass(strings.NewReader(in))
	want := []row{
		{keys.Enrollment{Last: "Lovelace", First: "Ada", User: "ada", Email: "ada@example.edu", Role: "student", Affiliation: "University of Illinois"}, 1},
		{keys.Enrollment{Last: "van der Berg", First: "O'Neil-Smith", User: "bob", Email: "bob@example.edu", Role: "power", Affiliation: "Inst, of X"}, 2},
	}
	if !reflect.DeepEqual(rows, want) {
		t.Errorf("rows = %+v, want %+v", rows, want)
	}
	var got []string
	for _, err := range bad {
		got = append(got, err.Error())
	}
	for i, w := range []string{"4: 3 columns", "5: 1 columns, not the six: " + columns + "; separate them by commas", "6: empty email", "7: "} {
		if i >= len(got) || !strings.HasPrefix(got[i], w) {
			t.Errorf("bad = %q, want %q at %d", got, w, i)
		}
	}
}

func TestReadClassHeaderAndTwins(t *testing.T) {
	in := "lastname,firstname,username,email,role,affiliation\nx,y,ada,a@b,student,z\nx,y,Ada,a@b,student,z\n"
	rows, bad := readClass(strings.NewReader(in))
	if len(rows) != 1 || len(bad) != 2 || bad[0].Error() != "1: "+errHeader.Error() || !strings.Contains(bad[1].Error(), "line 2 already") {
		t.Errorf("readClass = %+v, %v", rows, bad)
	}
}

func TestTitle(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"ada", "Ada"}, {"ADA", "Ada"}, {"de la cruz", "De La Cruz"}, {"O'NEIL", "O'Neil"}, {"McDonald", "McDonald"},
		{"élodie", "Élodie"}, {"van der Berg", "van der Berg"}, {"", ""}, {"李", "李"},
	} {
		if got := title(c.in); got != c.want {
			t.Errorf("title(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

// FuzzCSV holds that no list crashes the reader, that every row it yields has the
// fields that raid needs, and that no row is lost without a word.
func FuzzCSV(f *testing.F) {
	f.Add("a,b,c,d@e,student,f\n")
	f.Add("\"a\nb,c")
	f.Fuzz(func(t *testing.T, in string) {
		rows, bad := readClass(strings.NewReader(in))
		seen := map[string]bool{}
		for _, r := range rows {
			if !keys.ValidName(r.User) || r.Email == "" || r.Role == "" || r.line < 1 || seen[r.User] {
				t.Errorf("readClass(%q) yields %+v", in, r)
			}
			seen[r.User] = true
		}
		if strings.TrimSpace(strings.Trim(in, "\ufeff\r\n")) != "" && len(rows)+len(bad) == 0 {
			t.Errorf("readClass(%q) says nothing", in)
		}
	})
}

// A fakeRaid answers admin enroll as raid does.
type fakeRaid struct {
	*dialtest.Server
	book  keys.Book
	admin string // its key file
}

func raid(t *testing.T) *fakeRaid {
	t.Helper()
	r := &fakeRaid{}
	r.serve(t, r.handle)
	return r
}

// serve starts the server, its admin's key and its host key file.
func (r *fakeRaid) serve(t *testing.T, handle func(string, ssh.Channel)) {
	t.Helper()
	dir := t.TempDir()
	r.admin = filepath.Join(dir, "admin")
	private, public, err := keys.NewKey("admin")
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.WriteKey(r.admin, private, public); err != nil {
		t.Fatal(err)
	}
	client, err := ssh.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = dialtest.ServeClient(t, client, handle)
	if err := os.WriteFile(filepath.Join(dir, "host_key.pub"), []byte(dialtest.Line(r.Host)+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (r *fakeRaid) handle(cmd string, ch ssh.Channel) {
	if cmd != "admin enroll" {
		dialtest.Exit(ch, 64)
		return
	}
	in, out, status := bufio.NewScanner(ch), json.NewEncoder(ch), uint32(0)
	for in.Scan() {
		var e keys.Enrollment
		if json.Unmarshal(in.Bytes(), &e) != nil {
			break
		}
		u, k, err := r.book.Check(e)
		if err != nil {
			out.Encode(map[string]any{"user": e.User, "error": err.Error(), "hint": "think\x1b[2J"})
			status = 65
			continue
		}
		_, old := r.book.User(u.Name)
		r.book.Apply(u, k)
		out.Encode(map[string]any{"user": u.Name, "fingerprint": k.Fingerprint, "new": !old})
	}
	dialtest.Exit(ch, status)
}

// keygen runs the program.
func (r *fakeRaid) keygen(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	args = append([]string{"--server", "rai@" + r.Addr, "-i", r.admin}, args...)
	status = run(t.Context(), args, &out, &errs)
	return status, out.String(), errs.String()
}

func TestOnePerson(t *testing.T) {
	r := raid(t)
	out := filepath.Join(t.TempDir(), "KEYS")
	args := []string{"-u", "Ada", "-e", "ada@example.edu", "-r", "student", "-t", "team7", "-f", "Ada", "--lastname", "Lovelace", "--out", out}
	status, stdout, stderr := r.keygen(t, args...)
	if status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	p, _, err := profile.Read(filepath.Join(out, "ada.rai_profile"))
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := p.Marshal(); string(text) != stdout {
		t.Errorf("stdout = %q, want the profile %q", stdout, text)
	}
	if p.KeyFile() != filepath.Join(out, "ada") || p.Server != "rai@"+r.Addr || p.HostKey != dialtest.Line(r.Host) || p.Team.Name != "team7" {
		t.Errorf("profile = %+v", p)
	}
	private, err := os.ReadFile(filepath.Join(out, "ada"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(private)
	if strings.Contains(stdout+stderr, "PRIVATE") || block == nil {
		t.Errorf("private key in the output, or none in its file:\n%s%s", stdout, stderr)
	}
	if info, _ := os.Stat(filepath.Join(out, "ada")); runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("key mode %v, want 0600", info.Mode())
	}
	s, err := keys.LoadSigner(filepath.Join(out, "ada"), nil)
	if err != nil {
		t.Fatal(err)
	}
	id, ok := r.book.Who(s.PublicKey(), loopback)
	if !ok || id.User != "ada" || id.Role != keys.Student || id.Team != "team7" {
		t.Errorf("raid knows %+v, %v", id, ok)
	}
	// The same line again: the same key, new facts.
	status, _, stderr = r.keygen(t, append(args, "-r", "power")...)
	if again, _ := os.ReadFile(filepath.Join(out, "ada")); status != 0 || !bytes.Equal(again, private) || len(r.book.Keys("ada")) != 1 {
		t.Errorf("again: status %d, %s; keys %v", status, stderr, r.book.Keys("ada"))
	}
	if u, _ := r.book.User("ada"); u.Role != keys.Power {
		t.Errorf("role %q, want power", u.Role)
	}
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func TestRefusals(t *testing.T) {
	r := raid(t)
	out := t.TempDir()
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"-e", "a@b", "-r", "student"}, 64, "empty username"},
		{[]string{"-u", "ada", "-r", "student"}, 64, "empty email"},
		{[]string{"-u", "ada", "-e", "a@b"}, 64, "empty role"},
		{[]string{"-u", "../ada", "-e", "a@b", "-r", "student"}, 65, "bad user name"},
		{[]string{"-u", "ada.pub", "-e", "a@b", "-r", "student"}, 65, "bad user name"},
		{[]string{"-u", "ada", "-e", "a@b", "-r", "king"}, 65, "valid roles are"},
		{[]string{"--nonsense"}, 64, "nonsense"},
		{[]string{"bogus"}, 64, "bogus"},
		{[]string{"runner"}, 64, "one name"},
		{[]string{"-u", "ada", "-e", "a@b", "-r", "student", "--server", "rai@127.0.0.1:1"}, 255, "cannot connect"},
		{[]string{"-u", "ada", "-e", "a@b", "-r", "student", "--known-hosts", os.DevNull}, 255, "SHA256:"},
	} {
		status, stdout, stderr := r.keygen(t, append([]string{"--out", out}, c.args...)...)
		if status != c.status || !strings.Contains(stderr, c.want) || stdout != "" || strings.Contains(stderr, "\x1b") {
			t.Errorf("rai-keygen %q = %d, %q, want %d and %q", c.args, status, stderr, c.status, c.want)
		}
	}
	if left, _ := os.ReadDir(out); len(left) > 0 {
		t.Errorf("refused people left files: %v", left)
	}
}

func TestClass(t *testing.T) {
	r := raid(t)
	dir := t.TempDir()
	var list strings.Builder
	for i := range 200 {
		fmt.Fprintf(&list, "last%d,first%d,u%d,u%d@example.edu,student,uiuc\n", i, i, i, i)
	}
	list.WriteString("x,y,bad,nomail,student,z\nshort,row\n")
	file := filepath.Join(dir, "class.csv")
	if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "KEYS")
	status, _, stderr := r.keygen(t, "-l", file, "--out", out)
	if status != 65 || !strings.Contains(stderr, "class.csv:201: bad: bad e-mail") || !strings.Contains(stderr, "class.csv:202: 2 columns") ||
		!strings.Contains(stderr, "Processing: Last7, First7\n") || !strings.Contains(stderr, "200 enrolled, 2 failed") {
		t.Errorf("status %d: %s", status, stderr)
	}
	if n := len(r.book.Users()); n != 200 {
		t.Errorf("%d users, want 200", n)
	}
	if len(r.Left) > 1 {
		t.Errorf("%d sessions for one list", len(r.Left))
	}
	for name, want := range map[string]bool{"u199": true, "u199.pub": true, "u199.rai_profile": true, "bad": false, "bad.pub": false} {
		if _, err := os.Stat(filepath.Join(out, name)); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", name, err, want)
		}
	}
}

func TestPubAndRunner(t *testing.T) {
	r := raid(t)
	dir := t.TempDir()
	_, public, err := keys.NewKey("mine")
	if err != nil {
		t.Fatal(err)
	}
	pub := filepath.Join(dir, "id.pub")
	os.WriteFile(pub, []byte(public+"\n"), 0o644)
	out := filepath.Join(dir, "KEYS")
	if status, _, stderr := r.keygen(t, "-u", "ada", "-e", "a@b", "-r", "student", "--pub", pub, "--out", out); status != 0 || len(r.book.Keys("ada")) != 1 {
		t.Errorf("--pub: %d, %s", status, stderr)
	}
	if _, err := os.Stat(filepath.Join(out, "ada")); err == nil {
		t.Error("--pub made a private key")
	}
	status, stdout, stderr := r.keygen(t, "runner", "gpu1", "--out", out)
	if u, _ := r.book.User("runner-gpu1"); status != 0 || u.Role != keys.Runner || stdout != filepath.Join(out, "runner-gpu1")+"\n" {
		t.Errorf("runner: %d, %+v, %q %s", status, u, stdout, stderr)
	}
}

// Somebody who may not enrol keeps no keys of others.
func TestNotAllowed(t *testing.T) {
	r := &fakeRaid{}
	r.serve(t, func(_ string, ch ssh.Channel) {
		fmt.Fprintln(ch.Stderr(), "raid: only staff may do that")
		dialtest.Exit(ch, 126)
	})
	out := t.TempDir()
	status, _, stderr := r.keygen(t, "-u", "ada", "-e", "a@b", "-r", "student", "--out", out)
	if left, _ := os.ReadDir(out); status != 126 || !strings.Contains(stderr, "only staff") || len(left) > 0 {
		t.Errorf("status %d, %s; left %v", status, stderr, left)
	}
}
