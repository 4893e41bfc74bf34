package blob_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rai-project/raid/sshd/blob"
	"github.com/rai-project/raid/sshd/blob/blobtest"
)

func open(t testing.TB, dir string, o blob.Options) *blob.Folder {
	t.Helper()
	f, err := blob.Open(dir, o)
	if err != nil {
		t.Fatalf("Open = %v", err)
	}
	return f
}

// create begins an upload, which the end of the test aborts.
func create(t testing.TB, s blob.Store, limit int64) *blob.Upload {
	t.Helper()
	u, err := s.Create(limit)
	if err != nil {
		t.Fatalf("Create = %v", err)
	}
	t.Cleanup(func() { u.Abort() })
	return u
}

// put commits text and returns its key.
func put(t testing.TB, s blob.Store, text string) blob.Key {
	t.Helper()
	u := create(t, s, 0)
	if _, err := io.WriteString(u, text); err != nil {
		t.Fatalf("Write = %v", err)
	}
	k, err := u.Commit(t.Context())
	if err != nil {
		t.Fatalf("Commit = %v", err)
	}
	return k
}

// files returns the names of all files in a folder.
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

// path is where a folder has a blob.
func path(dir string, k blob.Key) string {
	return filepath.Join(dir, "sha256", k.Hex()[:2], k.Hex()[2:])
}

func TestFolder(t *testing.T) {
	blobtest.Run(t, func(t testing.TB) blobtest.Place {
		dir := filepath.Join(t.TempDir(), "blobs")
		return blobtest.Place{Dir: dir,
			Open: func(t testing.TB, o blob.Options) blob.Store { return open(t, dir, o) },
			Tamper: func(t testing.TB, k blob.Key, text string) {
				t.Helper()
				if err := errors.Join(os.Remove(path(dir, k)), os.WriteFile(path(dir, k), []byte(text), 0o400)); err != nil {
					t.Fatal(err)
				}
			},
			Count: func(t testing.TB) int { return len(files(t, filepath.Join(dir, "sha256"))) },
		}
	})
}

// A blob is a file that nobody may write, and that whoever has it open may read though it
// be removed. Files of others in the folder are left alone.
func TestFiles(t *testing.T) {
	dir := t.TempDir()
	f := open(t, dir, blob.Options{})
	k := put(t, f, "old")
	if st, err := os.Stat(path(dir, k)); err != nil || st.Mode() != 0o400 {
		t.Errorf("mode of a blob = %v, %v, want 0400", st.Mode(), err)
	}
	reader, err := f.Open(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := f.Remove(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(reader); err != nil || string(got) != "old" {
		t.Errorf("a blob opened before its removal reads %q, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "sha256", "00", "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for info, err := range f.List(t.Context()) {
		t.Errorf("List gave %v, %v of a folder without blobs", info, err)
	}
}

func TestParseKey(t *testing.T) {
	for _, s := range blobtest.BadKeys() {
		if k, err := blob.ParseKey(s); err == nil {
			t.Errorf("ParseKey(%q) = %q, want an error", s, k)
		}
	}
	good := string(blobtest.KeyOf("x"))
	if k, err := blob.ParseKey(good); string(k) != good || err != nil {
		t.Errorf("ParseKey(%q) = %q, %v", good, k, err)
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add(string(blobtest.KeyOf("x")))
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
		if _, err := u.Commit(b.Context()); err != nil {
			b.Fatal(err)
		}
		syncing += time.Since(start)
	}
	b.ReportMetric(syncing.Seconds()*1000/float64(b.N), "ms-in-Commit/op")
}

// repeat is a reader of the same bytes for ever.
type repeat []byte

func (r repeat) Read(p []byte) (int, error) { return copy(p, r), nil }
