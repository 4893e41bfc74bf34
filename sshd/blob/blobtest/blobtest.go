// Package blobtest says in code what every blob.Store promises.
package blobtest

import (
	"bytes"
	"context"
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

// A Place is where a store has its blobs, for the length of one test.
type Place struct {
	// Dir is where uploads come to: the store's own folder, which is there once it was
	// opened.
	Dir string
	// Open opens the store, again after the first time, as a new process would.
	Open func(testing.TB, blob.Options) blob.Store
	// Tamper gives a blob other bytes behind the store's back.
	Tamper func(t testing.TB, k blob.Key, text string)
	// Count returns how many blobs and halves of blobs there are where blobs are kept.
	Count func(testing.TB) int
}

// Run runs the suite, each test in a new place.
func Run(t *testing.T, place func(testing.TB) Place) {
	for _, tt := range []struct {
		name string
		run  func(*testing.T, *bench)
	}{
		{"Upload", upload}, {"Abort", abort}, {"FailureSticks", failureSticks}, {"Reserve", reserve}, {"MakeRoom", makeRoom},
		{"Sweep", sweep}, {"SameContent", sameContent}, {"Tampering", tampering}, {"Ranges", ranges}, {"Remove", remove},
		{"Renew", renew}, {"List", list}, {"Adopt", adopt}, {"Keys", keys}, {"Cancelled", cancelled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := place(t)
			tt.run(t, &bench{p, p.Open(t, blob.Options{})})
		})
	}
}

// A bench is a place with its store open.
type bench struct {
	Place
	blob.Store
}

func (b *bench) create(t testing.TB, limit int64) *blob.Upload {
	t.Helper()
	u, err := b.Store.Create(limit)
	if err != nil {
		t.Fatalf("Create = %v", err)
	}
	t.Cleanup(func() { u.Abort() })
	return u
}

// put commits text and returns its key.
func (b *bench) put(t testing.TB, text string) blob.Key {
	t.Helper()
	u := b.create(t, 0)
	if _, err := io.WriteString(u, text); err != nil {
		t.Fatalf("Write = %v", err)
	}
	k, err := u.Commit(t.Context())
	if err != nil {
		t.Fatalf("Commit = %v", err)
	}
	return k
}

// check has a blob looked at in every way.
func (b *bench) check(t *testing.T, text string) {
	t.Helper()
	file, err := b.Store.Open(t.Context(), KeyOf(text))
	if err != nil {
		t.Fatalf("Open = %v", err)
	}
	defer file.Close()
	if got, err := io.ReadAll(file); err != nil || string(got) != text {
		t.Errorf("blob has %d bytes, %v, want the %d that were written", len(got), err, len(text))
	}
	if info, err := b.Stat(t.Context(), KeyOf(text)); err != nil || info.Size != int64(len(text)) || info.Key != KeyOf(text) || time.Since(info.Time) > time.Minute {
		t.Errorf("Stat = %+v, %v, want %d bytes of now", info, err, len(text))
	}
	if err := b.Verify(t.Context(), KeyOf(text)); err != nil {
		t.Errorf("Verify = %v", err)
	}
}

// KeyOf returns the key that a blob of text has.
func KeyOf(text string) blob.Key {
	return blob.Key(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text))))
}

// underway returns the names of the uploads that have come to a folder and are no blobs.
func underway(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func upload(t *testing.T, b *bench) {
	for _, text := range []string{"", "hello", strings.Repeat("0123456789", 2<<20)} {
		u := b.create(t, int64(len(text)))
		if n, err := io.Copy(u, iotest.HalfReader(strings.NewReader(text))); n != int64(len(text)) || err != nil {
			t.Errorf("io.Copy of %d bytes = %d, %v", len(text), n, err)
		}
		if len(text) > 0 {
			p := make([]byte, 2)
			if _, err := u.ReadAt(p, int64(len(text)-2)); err != nil || string(p) != text[len(text)-2:] {
				t.Errorf("ReadAt before Commit = %q, %v", p, err)
			}
		}
		for range 2 {
			if k, err := u.Commit(t.Context()); k != KeyOf(text) || err != nil || u.Size() != int64(len(text)) {
				t.Errorf("Commit of %d bytes = %s, %v, want %s; Size = %d", len(text), k, err, KeyOf(text), u.Size())
			}
		}
		if err := u.Abort(); err != nil {
			t.Errorf("Abort after Commit = %v", err)
		}
		if _, err := u.Write([]byte("x")); !errors.Is(err, blob.ErrDone) {
			t.Errorf("Write after Commit = %v, want ErrDone", err)
		}
		b.check(t, text)
	}
	if st, err := os.Stat(b.Dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the folder = %v, %v, want 0700", st.Mode(), err)
	}
	if left := underway(t, b.Dir); len(left) != 0 {
		t.Errorf("uploads after their Commit = %q, want none", left)
	}
}

// Whatever ends an upload but a good Commit leaves nothing.
func abort(t *testing.T, b *bench) {
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
		u := b.create(t, tt.limit)
		if _, err := io.Copy(u, tt.from); !errors.Is(err, tt.want) {
			t.Errorf("%s: io.Copy = %v, want %v", tt.name, err, tt.want)
		}
		if n := len(underway(t, b.Dir)); n != 1 {
			t.Errorf("%s: %d files during an upload, want one", tt.name, n)
		}
		for range 2 {
			if err := u.Abort(); err != nil {
				t.Errorf("%s: Abort = %v", tt.name, err)
			}
		}
		if k, err := u.Commit(t.Context()); k != "" || err == nil {
			t.Errorf("%s: Commit after Abort = %q, %v, want an error", tt.name, k, err)
		}
		if left := underway(t, b.Dir); len(left) != 0 || b.Count(t) != 0 {
			t.Errorf("%s: uploads after Abort = %q, blobs = %d, want none", tt.name, left, b.Count(t))
		}
	}
}

// A failed write is for good: what follows it must not become a blob with a hole.
func failureSticks(t *testing.T, b *bench) {
	u := b.create(t, 4)
	for _, p := range []string{"12345", "1"} {
		if n, err := u.Write([]byte(p)); n != 0 || !errors.Is(err, blob.ErrTooBig) {
			t.Errorf("Write(%q) = %d, %v, want ErrTooBig", p, n, err)
		}
	}
	if _, err := u.Commit(t.Context()); !errors.Is(err, blob.ErrTooBig) {
		t.Errorf("Commit = %v, want ErrTooBig", err)
	}
	if left := underway(t, b.Dir); len(left) != 0 || b.Count(t) != 0 {
		t.Errorf("uploads = %q, blobs = %d, want none", left, b.Count(t))
	}
}

func reserve(t *testing.T, b *bench) {
	for _, o := range []blob.Options{{Reserve: 1}, {ReserveBytes: 1 << 60}, {Reserve: 0.01, ReserveBytes: 1 << 60}} {
		s := b.Place.Open(t, o)
		if _, err := s.Create(0); !errors.Is(err, blob.ErrNoSpace) {
			t.Errorf("Create with %+v = %v, want ErrNoSpace", o, err)
		}
		// What is there already may stay.
		path := filepath.Join(b.Dir, "result")
		if err := os.WriteFile(path, []byte("result"), 0o600); err != nil {
			t.Fatal(err)
		}
		if k, _, err := s.Adopt(t.Context(), path, 0); k != KeyOf("result") || err != nil {
			t.Errorf("Adopt with %+v = %s, %v", o, k, err)
		}
	}
	free, total, err := b.Free()
	if err != nil || free <= 0 || total < free {
		t.Errorf("Free() = %d, %d, %v", free, total, err)
	}
}

// An upload is refused only after somebody was asked for room and had none.
func makeRoom(t *testing.T, b *bench) {
	var s blob.Store
	asked := 0
	s = b.Place.Open(t, blob.Options{ReserveBytes: 1 << 62, MakeRoom: func() {
		asked++
		for range s.List(t.Context()) { // it may use the store
		}
	}})
	if _, err := s.Create(0); !errors.Is(err, blob.ErrNoSpace) || asked != 1 {
		t.Errorf("Create = %v after asking %d times, want ErrNoSpace after 1", err, asked)
	}
}

// Opening removes the uploads of a dead process, and nothing else.
func sweep(t *testing.T, b *bench) {
	b.put(t, "kept")
	b.create(t, 0).Write([]byte("lost"))
	if err := os.WriteFile(filepath.Join(b.Dir, "tmp", "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var said []string
	b.Store = b.Place.Open(t, blob.Options{Logf: func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }})
	if err := b.Tidy(t.Context()); err != nil {
		t.Errorf("Tidy = %v", err)
	}
	if got := underway(t, b.Dir); !slices.Equal(got, []string{"notes"}) || b.Count(t) != 1 {
		t.Errorf("uploads after Open = %q, blobs = %d, want the notes alone, and one", got, b.Count(t))
	}
	if len(said) != 1 {
		t.Errorf("Open said %q, want one line", said)
	}
	b.check(t, "kept")
}

// Many commits of the same bytes are one blob, which is young.
func sameContent(t *testing.T, b *bench) {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			u, err := b.Store.Create(0)
			if err != nil {
				t.Error(err)
				return
			}
			defer u.Abort()
			for range 3 {
				io.WriteString(u, "same")
			}
			if k, err := u.Commit(t.Context()); k != KeyOf("samesamesame") || err != nil {
				t.Errorf("Commit = %s, %v", k, err)
			}
		})
	}
	wg.Wait()
	if n := b.Count(t); n != 1 {
		t.Errorf("%d blobs, want one", n)
	}
	b.check(t, "samesamesame")
	later := time.Now()
	k := b.put(t, "samesamesame")
	if gone, err := b.RemoveBefore(t.Context(), k, later); gone || err != nil {
		t.Errorf("RemoveBefore of what was committed again = %v, %v, want it kept", gone, err)
	}
	if n := b.Count(t); n != 1 {
		t.Errorf("%d blobs, want one", n)
	}
}

// Other bytes under a key are seen by whoever reads them all, and mended by whoever
// commits the right ones.
func tampering(t *testing.T, b *bench) {
	text := strings.Repeat("honest", 100_000)
	for _, bad := range []string{strings.Replace(text, "h", "H", 1), text + "!", text[1:], ""} {
		k := b.put(t, text)
		b.Tamper(t, k, bad)
		if err := b.Verify(t.Context(), k); !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("Verify of a changed blob = %v, want ErrCorrupt", err)
		}
		file, err := b.Store.Open(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, file); !errors.Is(err, blob.ErrCorrupt) || n > 0 && n >= int64(len(bad)) {
			t.Errorf("reading a changed blob = %d, %v, want ErrCorrupt before all of it", n, err)
		}
		file.Close()
		// Who knows how much there is does not read on to the end.
		if file, err = b.Store.Open(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(io.NewSectionReader(file, 0, int64(len(bad))), make([]byte, len(bad))); len(bad) > 0 && !errors.Is(err, blob.ErrCorrupt) {
			t.Errorf("reading the %d bytes of a changed blob = %v, want ErrCorrupt", len(bad), err)
		}
		file.Close()
		b.put(t, text)
		b.check(t, text)
	}
}

// Parts of a blob can be read in any order, each as io.ReaderAt and io.Seeker say.
func ranges(t *testing.T, b *bench) {
	want := bytes.Repeat([]byte("0123456789abcdef\n"), 400_000) // more than any buffer
	file, err := b.Store.Open(t.Context(), b.put(t, string(want)))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	n := int64(len(want))
	for _, r := range [][2]int64{{0, 1}, {n - 1, 1}, {0, 0}, {5, 100_000}, {1 << 20, 3 << 20}, {n - 10, 10}, {1<<20 - 1, 2}} {
		p := make([]byte, r[1])
		if m, err := file.ReadAt(p, r[0]); int64(m) != r[1] || err != nil && !(err == io.EOF && r[0]+r[1] == n) || !bytes.Equal(p, want[r[0]:r[0]+r[1]]) {
			t.Errorf("ReadAt(%d, %d) = %d, %v, or other bytes", r[0], r[1], m, err)
		}
	}
	if m, err := file.ReadAt(make([]byte, 20), n-10); m != 10 || err != io.EOF {
		t.Errorf("ReadAt over the end = %d, %v, want 10 and io.EOF", m, err)
	}
	if m, err := file.ReadAt(make([]byte, 20), n+5); m != 0 || err != io.EOF {
		t.Errorf("ReadAt beyond the end = %d, %v, want io.EOF", m, err)
	}
	if end, err := file.Seek(0, io.SeekEnd); end != n || err != nil {
		t.Errorf("Seek to the end = %d, %v, want %d", end, err, n)
	}
	for _, from := range []int64{n - 4, 17, 0} {
		if pos, err := file.Seek(from, io.SeekStart); pos != from || err != nil {
			t.Errorf("Seek(%d) = %d, %v", from, pos, err)
		}
		if got, err := io.ReadAll(file); err != nil || !bytes.Equal(got, want[from:]) {
			t.Errorf("%d bytes from %d on, %v, want %d", len(got), from, err, n-from)
		}
	}
	if _, err := file.Seek(-1, io.SeekStart); err == nil {
		t.Error("Seek before the start is no error")
	}
}

func remove(t *testing.T, b *bench) {
	k := b.put(t, "old")
	info, err := b.Stat(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	if gone, err := b.RemoveBefore(t.Context(), k, info.Time); gone || err != nil {
		t.Errorf("RemoveBefore its own time = %v, %v, want false", gone, err)
	}
	for i, want := range []bool{true, false} {
		if gone, err := b.RemoveBefore(t.Context(), k, info.Time.Add(1)); gone != want || err != nil {
			t.Errorf("RemoveBefore a later time, call %d = %v, %v, want %v", i+1, gone, err, want)
		}
	}
	if n := b.Count(t); n != 0 {
		t.Errorf("%d blobs after their removal", n)
	}
	if err := b.Store.Remove(t.Context(), k); err != nil {
		t.Errorf("Remove of what is gone = %v", err)
	}
	_, openErr := b.Store.Open(t.Context(), k)
	_, statErr := b.Stat(t.Context(), k)
	for name, err := range map[string]error{"Open": openErr, "Stat": statErr, "Verify": b.Verify(t.Context(), k)} {
		if !errors.Is(err, blob.ErrNotFound) || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of what is gone = %v, want ErrNotFound", name, err)
		}
	}
}

// A blob that somebody is about to refer to is renewed first: then it is there and
// stays, or is known to be gone.
func renew(t *testing.T, b *bench) {
	k := b.put(t, "x")
	for range 2 {
		later := time.Now()
		if err := b.Store.Renew(t.Context(), k); err != nil {
			t.Fatal(err)
		}
		if gone, err := b.RemoveBefore(t.Context(), k, later); gone || err != nil {
			t.Errorf("RemoveBefore of a renewed blob = %v, %v, want it kept", gone, err)
		}
	}
	b.check(t, "x")
	if gone, err := b.RemoveBefore(t.Context(), k, time.Now().Add(time.Second)); !gone || err != nil {
		t.Errorf("RemoveBefore = %v, %v, want it removed", gone, err)
	}
	if err := b.Store.Renew(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("Renew of a removed blob = %v, want ErrNotFound", err)
	}
}

func list(t *testing.T, b *bench) {
	var want []blob.Key
	for i := range 20 {
		want = append(want, b.put(t, fmt.Sprint(i)))
	}
	slices.Sort(want)
	var got []blob.Key
	for info, err := range b.Store.List(t.Context()) {
		if err != nil || info.Size == 0 || info.Time.After(time.Now().Add(time.Minute)) {
			t.Fatalf("List gave %+v, %v", info, err)
		}
		got = append(got, info.Key)
		if err := b.Store.Remove(t.Context(), info.Key); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("List = %q, want %q", got, want)
	}
	for range b.Store.List(t.Context()) {
		t.Error("List after all were removed is not empty")
	}
}

func adopt(t *testing.T, b *bench) {
	path := filepath.Join(b.Dir, "archive")
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
	for range 2 { // the second is there already
		write()
		if k, n, err := b.Store.Adopt(t.Context(), path, 5); k != KeyOf("built") || n != 5 || err != nil {
			t.Errorf("Adopt = %s, %d, %v", k, n, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Adopt the file is there: %v", err)
		}
		b.check(t, "built")
	}
	write()
	if _, _, err := b.Store.Adopt(t.Context(), path, 4); !errors.Is(err, blob.ErrTooBig) {
		t.Errorf("Adopt over its limit = %v, want ErrTooBig", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("after a failed Adopt the file is gone: %v", err)
	}
	for _, bad := range []struct {
		name string
		make func() error
	}{
		{"nothing", func() error { return os.Remove(path) }},
		{"a symbolic link", func() error { return os.Symlink("/etc/passwd", path) }},
		{"a folder", func() error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }},
		{"a FIFO", func() error { return errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)) }},
		{"a file of two names", func() error { write(); return os.Link(path, path+"2") }},
	} {
		if err := bad.make(); err != nil {
			t.Fatal(err)
		}
		if k, _, err := b.Store.Adopt(t.Context(), path, 0); err == nil {
			t.Errorf("Adopt of %s = %s, want an error", bad.name, k)
		}
	}
}

// BadKeys are none. A key may have come from anywhere, and none leads out of the store.
func BadKeys() []string {
	good := string(KeyOf("x"))
	return []string{"", "sha256:", "sha256:..", good + "0", good[:len(good)-1], strings.ToUpper(good), strings.TrimPrefix(good, "sha256:"),
		"sha256:../" + good[10:], "md5:" + good[7:], good[:70] + "\x00", "sha256:" + strings.Repeat("A", 64)}
}

func keys(t *testing.T, b *bench) {
	for _, s := range BadKeys() {
		k := blob.Key(s)
		if _, err := b.Store.Open(t.Context(), k); !errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Open(%q) = %v, want ErrNotFound", s, err)
		}
		for name, err := range map[string]error{"Remove": b.Store.Remove(t.Context(), k), "Renew": b.Store.Renew(t.Context(), k), "Verify": b.Verify(t.Context(), k)} {
			if err == nil {
				t.Errorf("%s(%q) = nil, want an error", name, s)
			}
		}
	}
}

// A commit that nobody waits for any more fails whole or succeeds whole.
func cancelled(t *testing.T, b *bench) {
	ctx, cancel := context.WithCancel(t.Context())
	u := b.create(t, 0)
	io.WriteString(u, "too late")
	cancel()
	k, err := u.Commit(ctx)
	switch n := b.Count(t); {
	case err == nil && (k != KeyOf("too late") || n != 1), err != nil && (k != "" || n != 0):
		t.Errorf("Commit = %q, %v, and there are %d blobs", k, err, n)
	}
	if left := underway(t, b.Dir); len(left) != 0 {
		t.Errorf("uploads = %q, want none", left)
	}
}
