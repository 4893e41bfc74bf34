// Package machine is what every engine needs of the machine it runs on: a run folder
// that one process owns, a copy of the shim in it, disks for boxes, and what the
// kernel tells about mounts and cgroups.
//
// Promises: what it makes lies below the run folder and goes with it; a later process
// of the same folder can remove what an earlier one left. Non-goal: anything that
// differs between engines.
package machine

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Folder is a run folder, locked for as long as this process lives. The lock also
// keeps systemd-tmpfiles away from it.
type Folder struct {
	Path string
	lock *os.File
}

// Claim makes the folder, or takes over the one that an earlier process left, and
// locks it. "" means "raid-<id>" in /var/tmp, so that it is found again. Every folder
// above it must be passable for everybody, and nothing else may be in it.
func Claim(path, id string) (*Folder, error) {
	if path == "" {
		path = Default(id)
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	// In a shared folder somebody else may have been faster.
	var s unix.Stat_t
	if err := unix.Lstat(path, &s); err != nil {
		return nil, fmt.Errorf("run folder %s: %w", path, err)
	}
	if s.Mode&unix.S_IFMT != unix.S_IFDIR || int(s.Uid) != os.Geteuid() || s.Mode&0o022 != 0 {
		return nil, fmt.Errorf("run folder %s is not ours: remove it", path)
	}
	if noExec(path) {
		return nil, fmt.Errorf("run folder %s is on a file system mounted noexec: choose another", path)
	}
	lock, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open run folder: %w", err)
	}
	if err := flock(lock); err != nil {
		lock.Close()
		return nil, fmt.Errorf("run folder %s is in use by another process", path)
	}
	return &Folder{path, lock}, nil
}

// Default is the run folder of a runner that names none.
func Default(id string) string { return filepath.Join(runParent(), "raid-"+id) }

// flock takes a lock, if need be within a second: a process that was killed while it
// started another keeps its locks until that one has begun.
func flock(f *os.File) (err error) {
	for range 100 {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// runParent is /var/tmp, but for machines where programs may not be run from it.
func runParent() string {
	for _, dir := range [...]string{"/var/tmp", os.TempDir(), "/run"} {
		if unix.Access(dir, unix.W_OK) == nil && !noExec(dir) {
			return dir
		}
	}
	return "/var/tmp"
}

func noExec(dir string) bool {
	var s unix.Statfs_t
	return unix.Statfs(dir, &s) == nil && s.Flags&unix.ST_NOEXEC != 0
}

// CopyShim copies exe into the folder under the name of its hash, so that an upgrade
// never changes the program under a box.
func (f *Folder) CopyShim(exe string) (string, error) {
	src, err := os.Open(exe)
	if err != nil {
		return "", err
	}
	defer src.Close()
	tmp, err := os.CreateTemp(f.Path, "shim-")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name())
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(tmp, h), src)
	if err := errors.Join(err, tmp.Chmod(0o555), tmp.Close()); err != nil {
		return "", err
	}
	name := filepath.Join(f.Path, "shim-"+hex.EncodeToString(h.Sum(nil)[:8]))
	return name, os.Rename(tmp.Name(), name)
}

// Remove removes the folder and all in it, and gives up the lock. What is mounted in it
// is unmounted first, for it may be somebody else's.
func (f *Folder) Remove() error {
	err := unmountBelow(f.Path)
	if err == nil {
		err = os.RemoveAll(f.Path)
	}
	return errors.Join(err, f.lock.Close())
}

var (
	validID   = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
	validName = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
)

// ValidID reports whether id can name a runner in folders, cgroups and labels.
func ValidID(id string) bool { return validID.MatchString(id) }

// Names are the boxes of an engine that are open. The zero value has none.
type Names struct {
	mu   sync.Mutex
	open map[string]bool
}

// Open notes that a box is open, unless one of that name is.
func (n *Names) Open(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("bad box ID %q", name)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[name] {
		return errors.New("a box of this ID is open")
	}
	if n.open == nil {
		n.open = map[string]bool{}
	}
	n.open[name] = true
	return nil
}

// Sweep calls f while no box can be opened or closed; open says which ones are.
func (n *Names) Sweep(f func(open func(name string) bool) error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return f(func(name string) bool { return n.open[name] })
}

// Close forgets a box.
func (n *Names) Close(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.open, name)
}
