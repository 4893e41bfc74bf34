package tree

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// plant makes files below a new folder: "name/" is a folder, "name>target" a link.
func plant(t testing.TB, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		name, body, _ := strings.Cut(name, "=")
		link, target, isLink := strings.Cut(name, ">")
		p := filepath.Join(dir, link)
		err := os.MkdirAll(filepath.Dir(p), 0o755)
		switch {
		case err != nil:
		case isLink:
			err = os.Symlink(target, p)
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(p, 0o755)
		default:
			err = os.WriteFile(p, []byte(body), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// listing packs dir and returns what is in the tar, and the tar.
func listing(t testing.TB, dir string, o PackOptions) (string, Packed, []byte) {
	t.Helper()
	var b bytes.Buffer
	done, err := Pack(&b, dir, o)
	if err != nil {
		t.Fatalf("Pack = %v", err)
	}
	if sum, err := Check(bytes.NewReader(b.Bytes()), "", Limits{}); err != nil || sum.Entries != done.Entries || sum.Bytes != done.Bytes {
		t.Fatalf("Check of what Pack wrote = %+v, %v, want %+v", sum, err, done)
	}
	var out []string
	tr := tar.NewReader(bytes.NewReader(b.Bytes()))
	for h, err := tr.Next(); err == nil; h, err = tr.Next() {
		body, _ := io.ReadAll(tr)
		out = append(out, h.Name+strings.Repeat(">"+h.Linkname, min(1, len(h.Linkname)))+strings.Repeat("="+string(body), min(1, len(body))))
	}
	return strings.Join(out, " "), done, b.Bytes()
}

func TestPack(t *testing.T) {
	dir := plant(t, "b=2", "a/z=1", "a/l>/etc/passwd", "a.b=3", "empty/", "d>a", "skip/x=1", "keep/skip=1")
	if err := os.Link(filepath.Join(dir, "b"), filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	skip := func(rel string, dir bool) bool { return rel == "skip" && dir || rel == "keep/skip" && !dir }
	got, done, _ := listing(t, dir, PackOptions{Skip: skip})
	if want := "a/ a/l>/etc/passwd a/z=1 a.b=3 b=2 c>b d>a empty/ keep/"; got != want {
		t.Errorf("Pack wrote %s, want %s", got, want)
	}
	if want := (Packed{Entries: 9, Bytes: 3, LeftOut: 1, FirstLeftOut: "socket (neither file, folder nor link)"}); done != want {
		t.Errorf("Pack = %+v, want %+v", done, want)
	}
}

func TestPackLimits(t *testing.T) {
	dir := plant(t, "a=1234", "b=123456789", "c=12")
	got, done, _ := listing(t, dir, PackOptions{Limit: 6})
	if got != "a=1234 c=12" || done.LeftOut != 1 || done.FirstLeftOut != "b (9 bytes, over the limit of 6 bytes for all)" {
		t.Errorf("Pack with a limit = %s, %+v", got, done)
	}
	got, done, _ = listing(t, dir, PackOptions{Entries: 2})
	if got != "a=1234 b=123456789" || done.LeftOut != 1 {
		t.Errorf("Pack with 2 entries = %s, %+v", got, done)
	}
}

func TestPackOfDeepFolders(t *testing.T) {
	dir := plant(t)
	at := dir
	for i := range 300 {
		at = filepath.Join(at, "d")
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatalf("folder %d: %v", i, err)
		}
	}
	if _, done, _ := listing(t, dir, PackOptions{}); done.Entries != maxDepth || done.LeftOut != 1 {
		t.Errorf("Pack of 300 folders = %+v, want %d and the rest left out", done, maxDepth)
	}
}

func TestPackIsDeterministic(t *testing.T) {
	when := time.Unix(1700000000, 123456789)
	make := func() []byte {
		dir := plant(t, "a/b=1", "c=2", "l>c", "caf\xe9=")
		filepath.Walk(dir, func(p string, fi os.FileInfo, err error) error {
			if err == nil && fi.Mode()&os.ModeSymlink != 0 {
				return os.Remove(p)
			}
			return os.Chtimes(p, when, when)
		})
		_, _, b := listing(t, dir, PackOptions{})
		return b
	}
	if a, b := make(), make(); !bytes.Equal(a, b) {
		t.Error("Pack of equal trees gave different bytes")
	}
}

func TestRoundTrip(t *testing.T) {
	dir := plant(t, "a/b=1", "a/"+strings.Repeat("n", 250)+"=x", "na\tme\xff=", "run=#!", "l>../x", "empty/")
	os.Chmod(filepath.Join(dir, "run"), 0o750)
	os.Link(filepath.Join(dir, "run"), filepath.Join(dir, "twin"))
	when := time.Unix(1600000000, 0)
	os.Chtimes(filepath.Join(dir, "a"), when, when)
	_, _, first := listing(t, dir, PackOptions{})
	again := t.TempDir()
	if err := Unpack(again, bytes.NewReader(first)); err != nil {
		t.Fatal(err)
	}
	// A link's own time is not kept.
	os.Remove(filepath.Join(dir, "l"))
	os.Remove(filepath.Join(again, "l"))
	_, _, first = listing(t, dir, PackOptions{})
	if _, _, second := listing(t, again, PackOptions{}); !bytes.Equal(first, second) {
		t.Error("Pack, Unpack and Pack gave other bytes than Pack")
	}
}

// A file that changes under the packer must not shift what comes after it.
func TestPackOfChangingFiles(t *testing.T) {
	dir := plant(t, "a="+strings.Repeat("a", 700<<10), "b=bb", "c=c", "d=d")
	change := &trigger{after: 256 << 10, do: func() {
		os.Truncate(filepath.Join(dir, "a"), 300<<10)
		os.Remove(filepath.Join(dir, "b"))
		os.Remove(filepath.Join(dir, "c"))
		os.Symlink("/etc/passwd", filepath.Join(dir, "c"))
	}}
	done, err := Pack(change, dir, PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	sum, err := Check(&change.b, "", Limits{})
	if err != nil || sum.Bytes != 700<<10+1 || done.Changed != 1 || done.LeftOut != 1 || !strings.HasPrefix(done.FirstLeftOut, "b (") {
		t.Errorf("Pack of a changing folder = %+v, Check = %+v, %v", done, sum, err)
	}
}

// A trigger calls do once, when it has been written so many bytes.
type trigger struct {
	b     bytes.Buffer
	after int
	do    func()
}

func (g *trigger) Write(p []byte) (int, error) {
	n, err := g.b.Write(p)
	if g.do != nil && g.b.Len() >= g.after {
		g.do()
		g.do = nil
	}
	return n, err
}

func TestPackErrors(t *testing.T) {
	if _, err := Pack(io.Discard, filepath.Join(t.TempDir(), "nope"), PackOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Pack of no folder = %v, want %v", err, os.ErrNotExist)
	}
	lost := errors.New("lost")
	if _, err := Pack(&failing{lost}, plant(t, "a="+strings.Repeat("a", 700<<10)), PackOptions{}); !errors.Is(err, lost) {
		t.Errorf("Pack to a failing writer = %v, want %v", err, lost)
	}
}

func BenchmarkCheck(b *testing.B) {
	big := makeTar(b, reg("a", strings.Repeat("x", 64<<20)))
	small := makeTar(b, many(20000)...)
	for name, in := range map[string][]byte{"big": big, "small": small, "gzip": gz(b, big)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(in)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Check(bytes.NewReader(in), "rai_build.yml", Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReceiveToFile(b *testing.B) {
	in := makeTar(b, reg("a", strings.Repeat("x", 256<<20)))
	f, err := os.Create(filepath.Join(b.TempDir(), "upload"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for _, mode := range []string{"receive", "copy"} {
		b.Run(mode, func(b *testing.B) {
			b.SetBytes(int64(len(in)))
			for b.Loop() {
				f.Seek(0, io.SeekStart)
				if mode == "copy" {
					io.CopyBuffer(struct{ io.Writer }{f}, struct{ io.Reader }{bytes.NewReader(in)}, make([]byte, bufSize))
				} else if _, err := Receive(bytes.NewReader(in), f, "", Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkUnpack(b *testing.B) {
	var files []th
	for i := range 2000 {
		files = append(files, reg(fmt.Sprintf("src/lib/part%d/file%d.cu", i/50, i), strings.Repeat("x", 2000)))
	}
	in := makeTar(b, files...)
	for b.Loop() {
		if err := Unpack(b.TempDir(), bytes.NewReader(in)); err != nil {
			b.Fatal(err)
		}
	}
}
