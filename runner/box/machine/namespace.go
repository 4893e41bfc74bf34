package machine

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A Namespace is the mount namespace of another process: that of an engine which cannot
// see what is mounted in ours, as when a systemd unit has Protect options. nil is our own.
type Namespace struct{ file *os.File }

// NamespaceOf returns the mount namespace of a process, nil if it is ours. What is
// mounted in it belongs to the users of this machine, so the process must know the same.
func NamespaceOf(pid int) (*Namespace, error) {
	var theirs, ours [2]string
	for i, kind := range [...]string{"mnt", "user"} {
		var err, own error
		theirs[i], err = os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		ours[i], own = os.Readlink("/proc/self/ns/" + kind)
		if err := errors.Join(err, own); err != nil {
			return nil, err
		}
	}
	if theirs[0] == ours[0] {
		return nil, nil
	}
	if theirs[1] != ours[1] {
		return nil, errors.New("its users are not those of this machine")
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil, err
	}
	n := &Namespace{f}
	if err := n.Do(func() error { return nil }); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return n, nil
}

// Do calls f where paths lead to what the namespace shows; files that f opens can be used
// elsewhere. f must start no goroutines: they would run outside.
func (n *Namespace) Do(f func() error) (err error) {
	if n == nil {
		return f()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread does not end, and is the one that /proc/self shows. Another
			// one it is, then, while this goroutine holds it.
			defer runtime.UnlockOSThread()
			err = n.Do(f)
			return
		}
		if err = n.enter(); err == nil {
			err = f()
		}
	}()
	<-done
	return err
}

// enter moves this thread.
func (n *Namespace) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // root and working folder of its own
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("enter a mount namespace: %w", err)
	}
	return nil
}

// Sees reports whether a path leads to the same file there as here.
func (n *Namespace) Sees(path string) bool {
	var here, there unix.Stat_t
	err := unix.Stat(path, &here)
	return errors.Join(err, n.Do(func() error { return unix.Stat(path, &there) })) == nil &&
		here.Dev == there.Dev && here.Ino == there.Ino
}

// show mounts there, at a folder, what this process sees at from (Linux 5.2).
func (n *Namespace) show(from, at string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return n.Do(func() error {
		return unix.MoveMount(tree, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
}

// unmount unmounts what lies at a path there.
func (n *Namespace) unmount(at string) error {
	return n.Do(func() error { return unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
}

// unmountBelow unmounts all that lies in dir, there and here, where it may have spread to.
func (n *Namespace) unmountBelow(dir string) error {
	err := n.Do(func() error { return unmountBelow(dir) })
	if n != nil {
		err = errors.Join(err, unmountBelow(dir))
	}
	return err
}

// Close lets go of the namespace.
func (n *Namespace) Close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}
