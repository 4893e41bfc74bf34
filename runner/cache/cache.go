// Package cache keeps a folder for each team between its jobs: what a package manager
// downloaded, a compiler's cache, a data set in another form.
//
// A folder is a file system image of exactly the pool's quota, so that a team can fill
// its own and nothing else. It is mounted while a job of that team runs, and at no other
// time. Teams never share one, and nor do pools or runners.
//
// Promises: what is lost, damaged or too old is made anew, empty: a job must be able to
// run without. Non-goals: keeping anything safe; the same folder on two runners; runners
// that are not root, which may not mount.
package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Quota is what a pool allows each team.
type Quota struct {
	Bytes int64         // of the file system
	Keep  time.Duration // how long one that nobody uses is kept
}

// A Store holds the folders of one runner. It is for one job at a time.
type Store struct {
	dir, mounts string
	quotas      map[string]Quota
}

// minBytes is the smallest file system that is of any use.
const minBytes = 16 << 20

// Open returns the store whose images lie in dir. mounts is where they are mounted, a
// folder of its own below one that everybody may pass. What an earlier process left
// mounted there is unmounted, and images of pools without a quota are removed.
func Open(dir, mounts string, quotas map[string]Quota) (*Store, error) {
	s := &Store{dir: dir, mounts: mounts, quotas: quotas}
	if _, err := os.Stat(dir); os.Geteuid() != 0 || err != nil && len(quotas) == 0 {
		return s, nil // Folder says so to whoever asks
	}
	for folder, mode := range map[string]fs.FileMode{dir: 0o700, mounts: 0o711} {
		if err := ownFolder(folder, mode); err != nil {
			return nil, err
		}
	}
	left, err := os.ReadDir(mounts)
	if err != nil {
		return nil, err
	}
	for _, e := range left {
		if err := unmount(filepath.Join(mounts, e.Name())); err != nil {
			return nil, err
		}
	}
	return s, s.sweep(time.Now())
}

// ownFolder makes a folder, or takes one over that is ours.
func ownFolder(dir string, mode fs.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not ours: remove it", dir)
	}
	return os.Chmod(dir, mode)
}

// A Folder is mounted until it is closed.
type Folder struct {
	Path  string
	image string
}

// Folder mounts a tenant's folder in a pool; it is nil if the pool has no quota. Close
// must follow, after the last process that uses it has gone.
func (s *Store) Folder(ctx context.Context, pool, tenant string) (*Folder, error) {
	q, ok := s.quotas[pool]
	if !ok {
		return nil, nil
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the runner is not root and may not mount one")
	}
	if err := s.sweep(time.Now()); err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(tenant))
	name := hex.EncodeToString(sum[:16])
	f := &Folder{Path: filepath.Join(s.mounts, name), image: filepath.Join(s.dir, url.PathEscape(pool), name)}
	size := max(q.Bytes, minBytes) &^ 4095
	if i, err := os.Stat(f.image); err != nil || i.Size() != size { // new, or of another quota
		if err := create(ctx, f.image, size); err != nil {
			return nil, err
		}
	}
	if err := f.mount(ctx); err == nil {
		return f, nil
	}
	if err := create(ctx, f.image, size); err != nil { // a power cut may have damaged it
		return nil, err
	}
	if err := f.mount(ctx); err != nil {
		return nil, err
	}
	return f, nil
}

// create makes an empty image in the place of whatever is there.
func create(ctx context.Context, image string, size int64) error {
	if err := os.MkdirAll(filepath.Dir(image), 0o700); err != nil {
		return err
	}
	tmp := image + ".new"
	defer os.Remove(tmp)
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(tmp, size); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, tool("mkfs.ext4"), "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", tmp).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return os.Rename(tmp, image)
}

// mount mounts the image by mount(8), which finds it a loop device that frees itself.
func (f *Folder) mount(ctx context.Context) error {
	if err := os.Mkdir(f.Path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	out, err := exec.CommandContext(ctx, tool("mount"), "-t", "ext4", "-o", "loop,nosuid,nodev,noatime,discard", f.image, f.Path).CombinedOutput()
	if err != nil {
		os.Remove(f.Path)
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	os.Remove(filepath.Join(f.Path, "lost+found")) // confusing, and empty
	return nil
}

// Close unmounts the folder. It is kept, and counts as used now.
func (f *Folder) Close() error {
	now := time.Now()
	return errors.Join(unmount(f.Path), os.Chtimes(f.image, now, now))
}

// unmount unmounts all that lies on a folder, and removes the folder.
func unmount(dir string) error {
	for {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if err == unix.EBUSY { // somebody looks into it
			err = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		switch {
		case err == unix.EINVAL: // nothing is mounted any more
			return os.Remove(dir)
		case err != nil:
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
}

// sweep removes images that nobody has used for as long as their pool says.
func (s *Store) sweep(now time.Time) error {
	pools, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, p := range pools {
		dir := filepath.Join(s.dir, p.Name())
		pool, err := url.PathUnescape(p.Name())
		q, ok := s.quotas[pool]
		if err != nil || !ok {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		images, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range images {
			if i, err := e.Info(); err == nil && q.Keep > 0 && now.Sub(i.ModTime()) > q.Keep {
				if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// Close removes what the store needed beside the images.
func (s *Store) Close() error {
	if err := os.Remove(s.mounts); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// tool is found although sbin is not on every PATH.
func tool(name string) string {
	for _, dir := range [...]string{"/usr/sbin", "/sbin"} {
		if p := filepath.Join(dir, name); unix.Access(p, unix.X_OK) == nil {
			return p
		}
	}
	return name
}
