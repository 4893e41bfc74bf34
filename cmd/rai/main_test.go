package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/keys/profile"
)

func TestQuote(t *testing.T) {
	words := []string{"logs", "17", "-f", "a b", "it's", "", "$HOME", "*", "\"", "\\", "a\nb", "--x=y z", "é", "#no", "~", "-n"}
	line := quote(words)
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("no sh to ask")
	}
	out, err := exec.Command(sh, "-c", `printf '%s\0' `+line).Output()
	if got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"); err != nil || !slices.Equal(got, words) {
		t.Errorf("sh reads quote(%q) = %s as %q, %v", words, line, got, err)
	}
}

func TestLine(t *testing.T) {
	for _, c := range []struct {
		a    app
		want string // "" for an error
	}{
		{app{}, "submit"},
		{app{submission: submission{queue: "rai_amd64", kind: "final", timeout: "10m", gpus: "1", detach: true, json: true}}, "submit -q rai_amd64 --as final --gpus 1 --timeout 10m --detach --json"},
		{app{dashed: true, tail: []string{"make", "test"}}, "submit -- make test"},
		{app{dashed: true, tail: []string{"make && ./a > 'x y'"}}, "submit -- make && ./a > 'x y'"},
		{app{dashed: true, tail: []string{"./a", "x y"}}, "submit -- ./a 'x y'"},
		{app{submission: submission{name: "a; b"}}, "submit --name 'a; b'"},
		{app{dashed: true}, ""},
		{app{submission: submission{name: "a -- rm"}}, ""},
		{app{submission: submission{name: "--"}}, ""},
		{app{submission: submission{detach: true, output: "x"}}, ""},
	} {
		got, err := c.a.line()
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("line of %+v = %q, %v, want %q", c.a.submission, got, err, c.want)
		}
	}
}

func TestTakeOwn(t *testing.T) {
	var a app
	rest, err := a.takeOwn([]string{"17", "--server", "rai@h:1", "--json", "--profile=p", "-i"})
	if err != nil || !slices.Equal(rest, []string{"17", "--json", "-i"}) || a.server != "rai@h:1" || a.profile != "p" {
		t.Errorf("takeOwn = %q, %v, server %q, profile %q", rest, err, a.server, a.profile)
	}
	if _, err := a.takeOwn([]string{"--server"}); err == nil {
		t.Error("takeOwn of a flag without value: no error")
	}
}

func TestJobWatcher(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"raid: job 17 queued\nraid: job 18\n", "17"},
		{"raid: received 3 files; job 1042, source sha256 ab\n", "1042"},
		{"warning\nraid: hello\nraid: job 5\n", "5"},
		{"raid: no job 17", ""},
		{"say raid: job 17\n", ""},
		{"raid: myjob 17\n", ""},
		{strings.Repeat("x", 10000) + "\nraid: job 3\n", "3"},
	} {
		for _, step := range []int{1, 7, len(c.in)} { // however it is cut up
			var out bytes.Buffer
			w := &jobWatcher{w: &out}
			for chunk := range slices.Chunk([]byte(c.in), step) {
				w.Write(chunk)
			}
			if w.job() != c.want || out.String() != c.in {
				t.Errorf("in %.40q by %d: job %q, want %q", c.in, step, w.job(), c.want)
			}
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 999: "999 bytes", 1200: "1.2 kB", 1.2e6: "1.2 MB", 3e9: "3.0 GB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}

// plant makes files below a new folder; a name that ends in a slash is a folder.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		f := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(f), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// names lists the files in a compressed tar.
func names(t *testing.T, packed []byte) map[string]string {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	got := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			b, _ := io.ReadAll(r)
			if _, twice := got[h.Name]; twice {
				t.Errorf("%s stands in the tar twice", h.Name)
			}
			got[h.Name] = string(b)
		}
	}
}

func packed(t *testing.T, a *app) map[string]string {
	t.Helper()
	p := a.pack()
	b, err := io.ReadAll(p)
	if err := errors.Join(err, p.Close()); err != nil {
		t.Fatal(err)
	}
	return names(t, b)
}

var hairy = map[string]string{
	".gitignore": "# comment\n*.o\n/top\nbuild/\ndoc/*.txt\n**/deep/x\nlogs/**\n!keep.o\ntrail \\ \n\\#hash\n\\!bang\n[ab]?.c\n[!x]y\nfoo/**/bar\n" +
		"  \nunclosed[\nsp ace\n*.[[:digit:]]\nnegdir/*\n!negdir/in\nq\\*\n",
	"a.o": "", "keep.o": "", "sub/b.o": "", "top": "", "sub/top": "", "build/x": "", "sub/build/y": "", "sub2/build": "",
	"doc/a.txt": "", "doc/sub/a.txt": "", "m/n/deep/x": "", "deep/x": "", "deep/y": "", "logs/1/2": "", "#hash": "", "!bang": "",
	"a1.c": "", "c1.c": "", "a12.c": "", "xy": "", "zy": "", "foo/bar": "", "foo/1/bar": "", "foo/1/2/bar": "", "foo/1/baz": "",
	"unclosed[": "", "sp ace": "", "spaceless": "", "man.1": "", "man.x": "", "negdir/in": "", "negdir/out": "", "q*": "", "qq": "", "é.o": "", "ü": "",
	"nest/.gitignore": "!*.o\nlocal\n", "nest/a.o": "", "nest/local": "", "nest/deeper/local": "", "local": "",
}

// The ignore rules must be git's own.
func TestIgnoreAsGit(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		if os.Getenv("RAID_CI") == "1" {
			t.Fatal("no git")
		}
		t.Skip("no git to compare with")
	}
	dir := plant(t, hairy)
	cmd := func(args ...string) []byte {
		c := exec.Command("git", append([]string{"-C", dir, "-c", "core.excludesFile="}, args...)...)
		c.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_CONFIG_NOSYSTEM=1")
		out, err := c.Output()
		if err != nil {
			t.Fatalf("git %q: %v", args, err)
		}
		return out
	}
	cmd("init", "-q")
	want := strings.Split(strings.TrimSuffix(string(cmd("ls-files", "-z", "--others", "--exclude-standard")), "\x00"), "\x00")
	var got []string
	for n := range packed(t, &app{submission: submission{path: dir}, err: io.Discard}) {
		got = append(got, n)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		for _, n := range want {
			if !slices.Contains(got, n) {
				t.Errorf("%q is left out, git keeps it", n)
			}
		}
		for _, n := range got {
			if !slices.Contains(want, n) {
				t.Errorf("%q is packed, git ignores it", n)
			}
		}
	}
}

func TestPackLeavesOut(t *testing.T) {
	dir := plant(t, map[string]string{
		"rai_build.yml": "old", "main.cu": "1", "data.bin": "2", ".gitignore": "*.bin\nrai_build.yml\n*.log", ".raiignore": "!data.bin\nbig", "big": "", "x.log": "",
		".git/HEAD": "", "sub/.git": "gitdir: x", ".rai_profile": "", "sub/.rai_profile.yml": "", "KEYS/ada": "secret", "KEYS/ada.rai_profile": "",
		"out/old": "", "lib/x": "",
	})
	a := &app{err: io.Discard, submission: submission{path: dir, keyFile: filepath.Join(dir, "KEYS", "ada"), output: filepath.Join(dir, "out")}}
	want := map[string]string{"rai_build.yml": "old", "main.cu": "1", "data.bin": "2", ".gitignore": "*.bin\nrai_build.yml\n*.log", ".raiignore": "!data.bin\nbig", "lib/x": ""}
	if got := packed(t, a); !reflect.DeepEqual(got, want) {
		t.Errorf("packed %q, want %q", got, want)
	}
	a.build = filepath.Join(t.TempDir(), "other.yml")
	os.WriteFile(a.build, []byte("new"), 0o600)
	want["rai_build.yml"] = "new"
	if got := packed(t, a); !reflect.DeepEqual(got, want) {
		t.Errorf("with --build packed %q, want %q", got, want)
	}
}

// A raid of the tests: submit takes a tar, prints it and ends with a status.
type fakeRaid struct {
	*dialtest.Server
	profile string
	lines   chan string
	files   chan map[string]string
	running chan struct{} // gets one when a job hangs
}

func raid(t *testing.T) *fakeRaid {
	t.Helper()
	r := &fakeRaid{lines: make(chan string, 9), files: make(chan map[string]string, 9), running: make(chan struct{}, 1)}
	key := filepath.Join(t.TempDir(), "ada")
	private, public, err := keys.NewKey("ada")
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.WriteKey(key, private, public); err != nil {
		t.Fatal(err)
	}
	client, err := ssh.ParsePrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = dialtest.ServeClient(t, client, func(cmd string, ch ssh.Channel) { r.handle(t, cmd, ch) })
	r.profile = filepath.Join(filepath.Dir(key), "ada.rai_profile")
	p := &profile.Profile{Server: "rai@" + r.Addr, Key: "/elsewhere/ada", HostKey: dialtest.Line(r.Host)}
	if err := p.Write(r.profile); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *fakeRaid) handle(t *testing.T, cmd string, ch ssh.Channel) {
	r.lines <- cmd
	switch {
	case cmd == "submit -q refused":
		fmt.Fprintln(ch.Stderr(), "raid: no such queue")
		dialtest.Exit(ch, 126)
	case cmd == "submit -q hang":
		fmt.Fprintln(ch.Stderr(), "raid: job 17 queued")
		io.Copy(io.Discard, ch)
		r.running <- struct{}{}
	case strings.HasPrefix(cmd, "submit"):
		b, _ := io.ReadAll(ch)
		r.files <- names(t, b)
		fmt.Fprintln(ch.Stderr(), "raid: job 17 queued")
		fmt.Fprintln(ch, "hello")
		dialtest.Exit(ch, 3)
	case cmd == "output 17":
		w := tar.NewWriter(ch)
		w.WriteHeader(&tar.Header{Name: "result.txt", Mode: 0o644, Size: 2, Typeflag: tar.TypeReg})
		io.WriteString(w, "42")
		w.Close()
		dialtest.Exit(ch, 0)
	default:
		in, _ := io.ReadAll(ch)
		fmt.Fprintf(ch, "%d bytes", len(in))
		dialtest.Exit(ch, 0)
	}
}

// rai runs the program.
func (r *fakeRaid) rai(ctx context.Context, t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var out, errs bytes.Buffer
	a := &app{in: null, out: &out, err: cli.Locked(&errs)}
	status = a.run(ctx, append([]string{"--profile", r.profile}, args...))
	return status, out.String(), errs.String()
}

func TestSubmit(t *testing.T) {
	r := raid(t)
	dir := plant(t, map[string]string{"rai_build.yml": "x", "a/b.cu": "y"})
	out := filepath.Join(t.TempDir(), "out")
	status, stdout, stderr := r.rai(t.Context(), t, "-p", dir, "--submit", "final", "-o", out, "--", "make && ./a")
	if status != 3 || stdout != "hello\n" || !strings.HasPrefix(stderr, "raid: job 17 queued\nrai: /build is in ") {
		t.Errorf("rai = %d, %q, %q", status, stdout, stderr)
	}
	if got := <-r.lines; got != "submit --as final -- make && ./a" {
		t.Errorf("raid got %q", got)
	}
	if got, want := <-r.files, map[string]string{"rai_build.yml": "x", "a/b.cu": "y"}; !reflect.DeepEqual(got, want) {
		t.Errorf("raid got %v, want %v", got, want)
	}
	if b, err := os.ReadFile(filepath.Join(out, "result.txt")); string(b) != "42" {
		t.Errorf("output: %q, %v", b, err)
	}
	// A second run must not mix with the first one's output.
	if status, _, stderr := r.rai(t.Context(), t, "-p", dir, "-o", out); status != 64 || !strings.Contains(stderr, "not empty") {
		t.Errorf("rai -o = %d, %q, want it refused", status, stderr)
	}
	if status, _, stderr := r.rai(t.Context(), t, "-p", dir, "-o", out, "--force"); status != 3 {
		t.Errorf("rai -o --force = %d, %q, want 3", status, stderr)
	}
}

// raid may refuse before it has read all.
func TestSubmitRefused(t *testing.T) {
	r := raid(t)
	dir := plant(t, map[string]string{"big": strings.Repeat("0123456789abcdef", 1<<18)})
	for range 5 {
		status, _, stderr := r.rai(t.Context(), t, "-p", dir, "-q", "refused")
		if status != 126 || stderr != "raid: no such queue\n" {
			t.Fatalf("rai = %d, %q, want 126 and raid's own words", status, stderr)
		}
	}
}

func TestInterrupt(t *testing.T) {
	r := raid(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-r.running
		cancel(errInterrupted)
	}()
	status, _, stderr := r.rai(ctx, t, "-p", plant(t, map[string]string{"x": ""}), "-q", "hang")
	if status != 130 || !strings.Contains(stderr, "job 17 is cancelled") {
		t.Errorf("rai = %d, %q, want 130", status, stderr)
	}
	if got := <-r.Left; got != "left" {
		t.Errorf("raid thinks that we %s, want left", got)
	}
}

func TestPass(t *testing.T) {
	r := raid(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"status", "17", "--json"}, "status 17 --json"},
		{[]string{"status", "17", "--server", "rai@" + "ADDR"}, "status 17"},
		{[]string{"logs", "17", "-f", "-n", "5"}, "logs 17 -f -n 5"},
		{[]string{"history", "--user", "a b"}, "history --user 'a b'"},
		{[]string{"output", "9", "x y"}, "output 9 'x y'"},
		{[]string{"admin", "users", "--", "x"}, "admin users -- x"},
		{[]string{"queue", "--help"}, "queue --help"},
	} {
		for i := range c.args {
			c.args[i] = strings.ReplaceAll(c.args[i], "ADDR", r.Addr)
		}
		status, stdout, stderr := r.rai(t.Context(), t, c.args...)
		if status != 0 || stdout != "0 bytes" {
			t.Errorf("rai %q = %d, %q, %q", c.args, status, stdout, stderr)
			continue
		}
		if got := <-r.lines; got != c.want {
			t.Errorf("rai %q sent %q, want %q", c.args, got, c.want)
		}
	}
}

func TestUsage(t *testing.T) {
	r := raid(t)
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("USERPROFILE", home)
	t.Chdir(home)
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"bogus"}, 64, "unknown command"},
		{[]string{"--bogus"}, 64, "bogus"},
		{[]string{"--"}, 64, "no command after --"},
		{nil, 64, "is no project"},
		{[]string{"-p", "nowhere"}, 65, "was not found"},
		{[]string{"--build", "nowhere", "-p", "."}, 65, "was not found"},
		{[]string{"--profile", "nowhere", "whoami"}, 65, "nowhere"},
		{[]string{"--server", "rai@h:x", "whoami"}, 64, "bad port"},
		{[]string{"--server", "rai@127.0.0.1:1", "whoami"}, 255, "cannot connect"},
	} {
		status, stdout, stderr := r.rai(t.Context(), t, c.args...)
		if status != c.status || !strings.Contains(stderr, c.want) || stdout != "" {
			t.Errorf("rai %q = %d, %q, want %d and %q", c.args, status, stderr, c.status, c.want)
		}
	}
	if status, stdout, _ := r.rai(t.Context(), t, "version"); status != 0 || !strings.HasPrefix(stdout, "rai ") {
		t.Errorf("rai version = %d, %q", status, stdout)
	}
}

// FuzzIgnore holds that no ignore file crashes the packer.
func FuzzIgnore(f *testing.F) {
	f.Add("*.o\n!a\n[a-\n**/\n", "a/b.o")
	f.Fuzz(func(t *testing.T, text, name string) {
		match(parseRules(text), name, false)
		match(parseRules(text), name, true)
	})
}
