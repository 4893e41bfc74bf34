package blob_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/rai-project/raid/sshd/blob"
)

func open(t testing.TB, dir string, o blob.Options) *blob.Folder {
	t.Helper()
	f, err := blob.Open(dir, o)
	if err != nil {
		t.Fatalf("Open = %v", err)
	}
	return f
}

func create(t testing.TB, f *blob.Folder, limit int64) *blob.Upload {
	t.Helper()
	u, err := f.Create(limit)
	if err != nil {
		t.Fatalf("Create = %v", err)
	}
	t.Cleanup(func() { u.Abort() })
	return u
}

// put commits text and returns its key.
func put(t testing.TB, f *blob.Folder, text string) blob.Key {
	t.Helper()
	u := create(t, f, 0)
	if _, err := io.WriteString(u, text); err != nil {
		t.Fatalf("Write = %v", err)
	}
	k, err := u.Commit()
	if err != nil {
		t.Fatalf("Commit = %v", err)
	}
	return k
}

func keyOf(text string) blob.Key {
	return blob.Key(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text))))
}

// files returns the names of all files in the folder.
func files(t testing.TB, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			names = append(names, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestUpload(t *testing.T) {
	dir := t.TempDir()
	f := open(t, filepath.Join(dir, "blobs"), blob.Options{})
	for _, text := range []string{"", "hello", strings.Repeat("0123456789", 2<<20)} {
		u := create(t, f, int64(len(text)))
		if n, err := io.Copy(u, iotest.HalfReader(strings.NewReader(text))); n != int64(len(text)) || err != nil {
			t.Errorf("io.Copy of %d bytes = %d, %v", len(text), n, err)
		}
		if len(text) > 0 {
			b := make([]byte, 2)
			if _, err := u.ReadAt(b, int64(len(text)-2)); err != nil || string(b) != text[len(text)-2:] {
				t.Errorf("ReadAt before Commit = %q, %v", b, err)
			}
		}
		for range 2 {
			if k, err := u.Commit(); k != keyOf(text) || err != nil || u.Size() != int64(len(text)) {
				t.Errorf("Commit of %d bytes = %s, %v, want %s; Size = %d", len(text), k, err, keyOf(text), u.Size())
			}
		}
		if err := u.Abort(); err != nil {
			t.Errorf("Abort after Commit = %v", err)
		}
		if _, err := u.Write([]byte("x")); !errors.Is(err, blob.ErrDone) {
			t.Errorf("Write after Commit = %v, want ErrDone", err)
		}
		checkBlob(t, f, text)
	}
	if st, err := os.Stat(filepath.Join(dir, "blobs")); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the folder = %v, %v, want 0700", st.Mode(), err)
	}
}

func checkBlob(t *testing.T, f *blob.Folder, text string) {
	t.Helper()
	file, err := f.Open(keyOf(text))
	if err != nil {
		t.Fatalf("Open = %v", err)
	}
	defer file.Close()
	if got, err := io.ReadAll(file); err != nil || string(got) != text {
		t.Errorf("blob has %d bytes, %v, want the %d that were written", len(got), err, len(text))
	}
	if info, err := f.Stat(keyOf(text)); err != nil || info.Size != int64(len(text)) || time.Since(info.Time) > time.Minute {
		t.Errorf("Stat = %+v, %v, want %d bytes of now", info, err, len(text))
	}
	if err := f.Verify(keyOf(text)); err != nil {
		t.Errorf("Verify = %v", err)
	}
	if st, err := file.Stat(); err != nil || st.Mode() != 0o400 {
		t.Errorf("mode of a blob = %v, %v, want 0400", st.Mode(), err)
	}
}

// TestAbort: whatever ends an upload but a good Commit leaves no file.
func TestAbort(t *testing.T) {
	broken := errors.New("connection reset")
	tests := []struct {
		name  string
		limit int64
		from  io.Reader
		want  error // of the copy
	}{
		{"aborted", 0, strings.NewReader("half"), nil},
		{"over its limit", 3, strings.NewReader("half"), blob.ErrTooBig},
		{"cut off", 0, io.MultiReader(strings.NewReader("half"), iotest.ErrReader(broken)), broken},
		// A reader that says so itself must not be taken for the end.
		{"truncated", 0, io.MultiReader(strings.NewReader("half"), iotest.ErrReader(io.ErrUnexpectedEOF)), io.ErrUnexpectedEOF},
	}
	for _, tt := range tests {
		dir := t.TempDir()
		f := open(t, dir, blob.Options{})
		u := create(t, f, tt.limit)
		if _, err := io.Copy(u, tt.from); !errors.Is(err, tt.want) {
			t.Errorf("%s: io.Copy = %v, want %v", tt.name, err, tt.want)
		}
		if len(files(t, dir)) != 1 {
			t.Errorf("%s: files during an upload = %q, want one", tt.name, files(t, dir))
		}
		for range 2 {
			if err := u.Abort(); err != nil {
				t.Errorf("%s: Abort = %v", tt.name, err)
			}
		}
		if k, err := u.Commit(); k != "" || err == nil {
			t.Errorf("%s: Commit after Abort = %q, %v, want an error", tt.name, k, err)
		}
		if left := files(t, dir); len(left) != 0 {
			t.Errorf("%s: files after Abort = %q, want none", tt.name, left)
		}
	}
}

// A failed write is for good: what follows it must not become a blob with a hole.
func TestFailureSticks(t *testing.T) {
	dir := t.TempDir()
	u := create(t, open(t, dir, blob.Options{}), 4)
	for _, p := range []string{"12345", "1"} {
		if n, err := u.Write([]byte(p)); n != 0 || !errors.Is(err, blob.ErrTooBig) {
			t.Errorf("Write(%q) = %d, %v, want ErrTooBig", p, n, err)
		}
	}
	if _, err := u.Commit(); !errors.Is(err, blob.ErrTooBig) {
		t.Errorf("Commit = %v, want ErrTooBig", err)
	}
	if left := files(t, dir); len(left) != 0 {
		t.Errorf("files = %q, want none", left)
	}
}

func TestReserve(t *testing.T) {
	for _, o := range []blob.Options{{Reserve: 1}, {ReserveBytes: 1 << 60}, {Reserve: 0.01, ReserveBytes: 1 << 60}} {
		if _, err := open(t, t.TempDir(), o).Create(0); !errors.Is(err, blob.ErrNoSpace) {
			t.Errorf("Create with %+v = %v, want ErrNoSpace", o, err)
		}
	}
	free, total, err := open(t, t.TempDir(), blob.Options{}).Free()
	if err != nil || free <= 0 || total < free {
		t.Errorf("Free() = %d, %d, %v", free, total, err)
	}
}

// TestSweep: Open removes the uploads of a dead process, and nothing else.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, blob.Options{})
	k := put(t, f, "kept")
	create(t, f, 0).Write([]byte("lost"))
	if err := os.WriteFile(filepath.Join(dir, "tmp", "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var said []string
	f = open(t, dir, blob.Options{Logf: func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }})
	want := []string{"sha256/" + k.Hex()[:2] + "/" + k.Hex()[2:], "tmp/notes"}
	if got := files(t, dir); !slices.Equal(got, want) {
		t.Errorf("files after Open = %q, want %q", got, want)
	}
	if len(said) != 1 {
		t.Errorf("Open said %q, want one line", said)
	}
	checkBlob(t, f, "kept")
}

// TestSameContent: many commits of the same bytes are one blob, mended and young.
func TestSameContent(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, blob.Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			u, err := f.Create(0)
			if err != nil {
				t.Error(err)
				return
			}
			defer u.Abort()
			for range 3 {
				io.WriteString(u, "same")
			}
			if k, err := u.Commit(); k != keyOf("samesamesame") || err != nil {
				t.Errorf("Commit = %s, %v", k, err)
			}
		})
	}
	wg.Wait()
	if got := files(t, dir); len(got) != 1 {
		t.Errorf("files = %q, want one", got)
	}
	path := filepath.Join(dir, files(t, dir)[0])
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("samesamesamf"), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := f.Verify(keyOf("samesamesame")); !errors.Is(err, blob.ErrCorrupt) {
		t.Errorf("Verify of a changed blob = %v, want ErrCorrupt", err)
	}
	put(t, f, "samesamesame")
	checkBlob(t, f, "samesamesame")
}

func TestRemove(t *testing.T) {
	f := open(t, t.TempDir(), blob.Options{})
	k := put(t, f, "old")
	reader, err := f.Open(k)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	info, err := f.Stat(k)
	if err != nil {
		t.Fatal(err)
	}
	if gone, err := f.RemoveBefore(k, info.Time); gone || err != nil {
		t.Errorf("RemoveBefore its own time = %v, %v, want false", gone, err)
	}
	for i, want := range []bool{true, false} {
		if gone, err := f.RemoveBefore(k, info.Time.Add(1)); gone != want || err != nil {
			t.Errorf("RemoveBefore a later time, call %d = %v, %v, want %v", i+1, gone, err, want)
		}
	}
	if got, err := io.ReadAll(reader); err != nil || string(got) != "old" {
		t.Errorf("a blob opened before its removal reads %q, %v", got, err)
	}
	if err := f.Remove(k); err != nil {
		t.Errorf("Remove of what is gone = %v", err)
	}
	_, openErr := f.Open(k)
	_, statErr := f.Stat(k)
	for name, err := range map[string]error{"Open": openErr, "Stat": statErr, "Verify": f.Verify(k)} {
		if !errors.Is(err, blob.ErrNotFound) || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of what is gone = %v, want ErrNotFound", name, err)
		}
	}
}

func TestList(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, blob.Options{})
	var want []blob.Key
	for i := range 20 {
		want = append(want, put(t, f, fmt.Sprint(i)))
	}
	slices.Sort(want)
	if err := os.WriteFile(filepath.Join(dir, "sha256", "00", "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var got []blob.Key
	for info, err := range f.List() {
		if err != nil || info.Size == 0 {
			t.Fatalf("List gave %+v, %v", info, err)
		}
		got = append(got, info.Key)
		if err := f.Remove(info.Key); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("List = %q, want %q", got, want)
	}
	for range f.List() {
		t.Error("List after all were removed is not empty")
	}
}

func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	f := open(t, filepath.Join(dir, "blobs"), blob.Options{})
	path := filepath.Join(dir, "archive")
	write := func() {
		t.Helper()
		os.RemoveAll(path)
		if err := os.WriteFile(path, []byte("built"), 0o644); err != nil {
			t.Fatal(err)
		}
		old := time.Unix(1, 0)
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second replaces the first
		write()
		if k, n, err := f.Adopt(path, 5); k != keyOf("built") || n != 5 || err != nil {
			t.Errorf("Adopt = %s, %d, %v", k, n, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Adopt the file is there: %v", err)
		}
		checkBlob(t, f, "built")
	}
	write()
	if _, _, err := f.Adopt(path, 4); !errors.Is(err, blob.ErrTooBig) {
		t.Errorf("Adopt over its limit = %v, want ErrTooBig", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("after a failed Adopt the file is gone: %v", err)
	}
	bad := map[string]func() error{
		"nothing":         func() error { return os.Remove(path) },
		"a symbolic link": func() error { return os.Symlink("/etc/passwd", path) },
		"a folder":        func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
		"a FIFO":          func() error { return errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)) },
		"a file of two names": func() error {
			os.RemoveAll(path)
			write()
			return os.Link(path, path+"2")
		},
	}
	for _, name := range []string{"nothing", "a symbolic link", "a folder", "a FIFO", "a file of two names"} {
		if err := bad[name](); err != nil {
			t.Fatal(err)
		}
		if k, _, err := f.Adopt(path, 0); err == nil {
			t.Errorf("Adopt of %s = %s, want an error", name, k)
		}
	}
}

// A key may have come from anywhere: none leads out of the folder.
func TestKeys(t *testing.T) {
	f := open(t, t.TempDir(), blob.Options{})
	good := string(keyOf("x"))
	bad := []string{"", "sha256:", "sha256:..", good + "0", good[:len(good)-1], strings.ToUpper(good), strings.TrimPrefix(good, "sha256:"),
		"sha256:../" + good[10:], "md5:" + good[7:], good[:70] + "\x00", "sha256:" + strings.Repeat("A", 64)}
	for _, s := range bad {
		if k, err := blob.ParseKey(s); err == nil {
			t.Errorf("ParseKey(%q) = %q, want an error", s, k)
		}
		if _, err := f.Open(blob.Key(s)); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Open(%q) = %v, want ErrNotFound", s, err)
		}
		if err := f.Remove(blob.Key(s)); err == nil {
			t.Errorf("Remove(%q) = nil, want an error", s)
		}
	}
	if k, err := blob.ParseKey(good); string(k) != good || err != nil {
		t.Errorf("ParseKey(%q) = %q, %v", good, k, err)
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(string(keyOf("x")))
	f.Add("sha256:../../../../etc/passwd")
	f.Fuzz(func(t *testing.T, s string) {
		k, err := blob.ParseKey(s)
		if err == nil && (string(k) != s || len(k.Hex()) != 64 || strings.Trim(k.Hex(), "0123456789abcdef") != "") {
			t.Errorf("ParseKey(%q) = %q", s, k)
		}
	})
}

// BenchmarkUpload moves 1 GiB, in the pieces an SSH channel gives and by ReadFrom.
func BenchmarkUpload(b *testing.B) {
	const size = 1 << 30
	block := bytes.Repeat([]byte("0123456789abcdef"), 2<<10) // 32 KiB
	b.Run("Write", func(b *testing.B) {
		benchmarkUpload(b, size, func(u *blob.Upload) error {
			for range size / len(block) {
				if _, err := u.Write(block); err != nil {
					return err
				}
			}
			return nil
		})
	})
	b.Run("ReadFrom", func(b *testing.B) {
		benchmarkUpload(b, size, func(u *blob.Upload) error {
			_, err := u.ReadFrom(io.LimitReader(repeat(block), size))
			return err
		})
	})
}

func benchmarkUpload(b *testing.B, size int64, send func(*blob.Upload) error) {
	f := open(b, b.TempDir(), blob.Options{Reserve: 0.05})
	b.SetBytes(size)
	var syncing time.Duration
	for b.Loop() {
		u := create(b, f, size)
		if err := send(u); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		if _, err := u.Commit(); err != nil {
			b.Fatal(err)
		}
		syncing += time.Since(start)
	}
	b.ReportMetric(syncing.Seconds()*1000/float64(b.N), "ms-in-Commit/op")
}

// repeat is a reader of the same bytes for ever.
type repeat []byte

func (r repeat) Read(p []byte) (int, error) { return copy(p, r), nil }
