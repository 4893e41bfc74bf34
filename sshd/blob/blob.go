// Package blob keeps uploads and outputs as files in one folder, each named by the
// SHA-256 of its bytes.
//
//	u, err := folder.Create(limit)
//	defer u.Abort()         // nothing once it is committed
//	_, err = io.Copy(u, r)  // hashed as it passes
//	key, err := u.Commit()  // durable now
//	f, err := folder.Open(key)
//
// It promises: a key that Commit or Adopt returned names the same bytes until it is
// removed, after a power cut too; there is never a file of half a blob under its final
// name; what was not committed leaves nothing, at the latest when the folder is opened
// again; and the disk is not filled: writing stops at a reserve. Non-goals: who may read
// what, how long a blob lives (its caller counts references, and asks with
// RemoveBefore), and two processes in one folder: hold a lock around it.
//
// On disk: sha256/ab/cdef… are blobs, 0400; tmp/ holds what is on its way.
package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound: there is no such blob. It is fs.ErrNotExist, too.
	ErrNotFound = fmt.Errorf("blob: not found: %w", fs.ErrNotExist)
	// ErrNoSpace: the disk is full up to the reserve. It may work later.
	ErrNoSpace = errors.New("blob: no space left")
	// ErrTooBig: more bytes than the limit.
	ErrTooBig = errors.New("blob: too big")
	// ErrCorrupt: a blob's bytes are not those of its key.
	ErrCorrupt = errors.New("blob: corrupt")
	// ErrDone: the upload was committed or aborted before.
	ErrDone = errors.New("blob: upload is over")
)

const keyPrefix = "sha256:"

// A Key names a blob: "sha256:" and 64 lower-case hex digits.
type Key string

// ParseKey returns s as a Key if it is one.
func ParseKey(s string) (Key, error) {
	digits, ok := strings.CutPrefix(s, keyPrefix)
	sum, err := hex.DecodeString(digits)
	if !ok || err != nil || len(sum) != sha256.Size || digits != strings.ToLower(digits) {
		return "", fmt.Errorf("blob: %.80q is no key", s)
	}
	return Key(s), nil
}

// Hex returns the digits alone, as sha256sum(1) prints them.
func (k Key) Hex() string { return strings.TrimPrefix(string(k), keyPrefix) }

func keyOf(sum []byte) Key { return Key(keyPrefix + hex.EncodeToString(sum)) }

// Options are a folder's. The zero value keeps nothing free and says nothing.
type Options struct {
	Reserve      float64 // share of the disk that uploads leave free, 0 to 1
	ReserveBytes int64   // the same in bytes; the larger one counts
	Logf         func(format string, args ...any)
}

// A Folder is where blobs are. It is safe for concurrent use.
type Folder struct {
	dir  string
	o    Options
	move sync.RWMutex // held to write while a blob is removed by age, to read while one arrives
}

// An Info describes a blob.
type Info struct {
	Key  Key
	Size int64
	Time time.Time // when it was last committed
}

// Open opens the folder dir and makes it, 0700, if need be. What a process that is
// gone was uploading is removed, so no other may be using dir.
func Open(dir string, o Options) (*Folder, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	f := &Folder{dir: dir, o: o}
	if f.o.Logf == nil {
		f.o.Logf = func(string, ...any) {}
	}
	if err := f.makeDirs(); err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	if err := f.sweep(); err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	return f, nil
}

// makeDirs makes every folder a blob can be in, so that a Commit has one to sync.
func (f *Folder) makeDirs() error {
	if err := os.MkdirAll(f.tmp(), 0o700); err != nil {
		return err
	}
	for i := range 256 {
		if err := os.MkdirAll(filepath.Join(f.dir, "sha256", fmt.Sprintf("%02x", i)), 0o700); err != nil {
			return err
		}
	}
	return errors.Join(syncDir(filepath.Join(f.dir, "sha256")), syncDir(f.dir), syncDir(filepath.Dir(f.dir)))
}

const tempPrefix = "upload-"

// sweep removes uploads that nobody is writing any more: those named as ours.
func (f *Folder) sweep() error {
	old, err := os.ReadDir(f.tmp())
	if err != nil {
		return err
	}
	for _, e := range old {
		if !strings.HasPrefix(e.Name(), tempPrefix) || !e.Type().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(f.tmp(), e.Name())); err != nil {
			return err
		}
		f.o.Logf("removed the unfinished upload %s", e.Name())
	}
	return nil
}

func (f *Folder) tmp() string { return filepath.Join(f.dir, "tmp") }

// path returns where k's file is. It checks k: a key may have come a long way.
func (f *Folder) path(k Key) (string, error) {
	if _, err := ParseKey(string(k)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return filepath.Join(f.dir, "sha256", k.Hex()[:2], k.Hex()[2:]), nil
}

// Open opens a blob for reading, or returns ErrNotFound. The caller closes it. It
// stays whole though the blob be removed meanwhile.
func (f *Folder) Open(k Key) (*os.File, error) {
	path, err := f.path(k)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(path)
	return file, describe(k, err)
}

// Stat describes a blob, or returns ErrNotFound.
func (f *Folder) Stat(k Key) (Info, error) {
	path, err := f.path(k)
	if err != nil {
		return Info{}, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return Info{}, describe(k, err)
	}
	return Info{k, st.Size(), st.ModTime()}, nil
}

// Verify reads a blob and returns ErrCorrupt if it is not what was committed.
func (f *Folder) Verify(k Key) error {
	file, err := f.Open(k)
	if err != nil {
		return err
	}
	defer file.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, onlyReader{file}, make([]byte, block)); err != nil {
		return describe(k, err)
	}
	if got := keyOf(h.Sum(nil)); got != k {
		return fmt.Errorf("%w: %s has the bytes of %s", ErrCorrupt, k, got)
	}
	return nil
}

// Remove removes a blob. One that is not there is no error.
func (f *Folder) Remove(k Key) error {
	path, err := f.path(k)
	if err != nil {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return describe(k, err)
	}
	return nil
}

// RemoveBefore removes a blob unless it was committed at t or later, and tells
// whether it did. Whoever removes by age uses it: the same bytes may just have been
// committed once more, by someone whose reference to them cannot be seen yet.
func (f *Folder) RemoveBefore(k Key, t time.Time) (bool, error) {
	f.move.Lock()
	defer f.move.Unlock()
	info, err := f.Stat(k)
	if errors.Is(err, ErrNotFound) || err == nil && !info.Time.Before(t) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Remove(k)
}

// List returns all blobs in the order of their keys. What comes or goes meanwhile
// may be in it or not. It ends with the first error.
func (f *Folder) List() iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		for i := range 256 {
			fan := fmt.Sprintf("%02x", i)
			files, err := os.ReadDir(filepath.Join(f.dir, "sha256", fan))
			if err != nil {
				yield(Info{}, fmt.Errorf("list blobs: %w", err))
				return
			}
			for _, e := range files {
				k, err := ParseKey(keyPrefix + fan + e.Name())
				if err != nil {
					continue // not ours
				}
				info, err := f.Stat(k)
				if errors.Is(err, ErrNotFound) {
					continue
				}
				if !yield(info, err) || err != nil {
					return
				}
			}
		}
	}
}

// Free returns how many bytes of the disk an unprivileged user can still write, and
// how many it has.
func (f *Folder) Free() (free, total int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(f.dir, &s); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", f.dir, err)
	}
	return int64(s.Bavail) * int64(s.Bsize), int64(s.Blocks) * int64(s.Bsize), nil
}

// room returns ErrNoSpace if less than the reserve is free.
func (f *Folder) room() error {
	free, total, err := f.Free()
	if err != nil {
		return err
	}
	if reserve := max(f.o.ReserveBytes, int64(f.o.Reserve*float64(total))); free < reserve || free == 0 {
		return fmt.Errorf("%w: %d MiB free, %d MiB reserved", ErrNoSpace, free>>20, reserve>>20)
	}
	return nil
}

// describe says what an error was about, in this package's words.
func describe(k Key, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s", ErrNotFound, k)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return fmt.Errorf("blob %s: %w", k, err)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// onlyReader hides all but Read: io.Copy would find ways around its buffer.
type onlyReader struct{ io.Reader }
