package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Folder is a Store of files on this machine.
type Folder struct {
	disk
	move sync.RWMutex // held to write while a blob is removed by age, to read while one arrives
}

// Open opens the folder dir and makes it, 0700, if need be. What a process that is
// gone was uploading is removed, so no other may be using dir.
func Open(dir string, o Options) (*Folder, error) {
	d, err := newDisk(dir, o)
	if err != nil {
		return nil, fmt.Errorf("open blobs: %w", err)
	}
	f := &Folder{disk: d}
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

// path returns where k's file is. It checks k: a key may have come a long way.
func (f *Folder) path(k Key) (string, error) {
	if _, err := ParseKey(string(k)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return filepath.Join(f.dir, "sha256", k.Hex()[:2], k.Hex()[2:]), nil
}

// Open is as Store says.
func (f *Folder) Open(_ context.Context, k Key) (File, error) {
	path, err := f.path(k)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, describe(k, err)
	}
	st, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, describe(k, err)
	}
	return check(k, file, st.Size()), nil
}

// Stat is as Store says.
func (f *Folder) Stat(_ context.Context, k Key) (Info, error) {
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

// Verify is as Store says.
func (f *Folder) Verify(ctx context.Context, k Key) error { return verify(ctx, f, k) }

// Remove is as Store says.
func (f *Folder) Remove(_ context.Context, k Key) error {
	path, err := f.path(k)
	if err != nil {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return describe(k, err)
	}
	return nil
}

// RemoveBefore is as Store says.
func (f *Folder) RemoveBefore(ctx context.Context, k Key, t time.Time) (bool, error) {
	f.move.Lock()
	defer f.move.Unlock()
	info, err := f.Stat(ctx, k)
	if errors.Is(err, ErrNotFound) || err == nil && !info.Time.Before(t) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Remove(ctx, k)
}

// Renew is as Store says.
func (f *Folder) Renew(_ context.Context, k Key) error {
	path, err := f.path(k)
	if err != nil {
		return err
	}
	f.move.RLock()
	defer f.move.RUnlock()
	now := time.Now()
	return describe(k, os.Chtimes(path, now, now))
}

// List is as Store says.
func (f *Folder) List(ctx context.Context) iter.Seq2[Info, error] {
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
				info, err := f.Stat(ctx, k)
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

// Tidy does nothing: Open has.
func (f *Folder) Tidy(context.Context) error { return nil }

// Link returns ErrNoLinks.
func (f *Folder) Link(context.Context, Key, string, time.Time) (string, error) { return "", ErrNoLinks }

// Shared is false.
func (f *Folder) Shared() bool { return false }

// Create is as Store says.
func (f *Folder) Create(limit int64) (*Upload, error) { return f.create(f, limit) }

// Adopt is as Store says. It is a rename where path lies on the folder's own file system.
func (f *Folder) Adopt(ctx context.Context, path string, limit int64) (Key, int64, error) {
	return adopt(ctx, f, path, limit)
}

// place makes file, whole and nobody's but ours, the blob k. The blob may be there
// already: the new file takes its place, so that its age is new, so that a rotten one
// is mended, and so that a commit of the same bytes that is not durable yet is not
// mistaken for one that is.
func (f *Folder) place(_ context.Context, file *os.File, k Key, _ int64) error {
	path, err := f.path(k)
	if err != nil {
		return err
	}
	now := time.Now()
	if err := errors.Join(file.Chmod(0o400), os.Chtimes(file.Name(), now, now)); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	f.move.RLock()
	defer f.move.RUnlock()
	if err := f.rename(file, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// rename moves file to path, from another file system, too.
func (f *Folder) rename(file *os.File, path string) error {
	err := os.Rename(file.Name(), path)
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	copied, err := os.CreateTemp(f.tmp(), tempPrefix)
	if err != nil {
		return err
	}
	defer copied.Close()
	_, err = io.Copy(copied, io.NewSectionReader(file, 0, 1<<62))
	if err = errors.Join(err, copied.Chmod(0o400), copied.Sync()); err == nil {
		err = os.Rename(copied.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(copied.Name()))
	}
	return os.Remove(file.Name())
}

// describe says what an error was about, in this package's words.
func describe(k Key, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrUnavailable), errors.Is(err, ErrDenied), errors.Is(err, ErrNoSpace), errors.Is(err, ErrCorrupt):
		return err // it has them already
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
