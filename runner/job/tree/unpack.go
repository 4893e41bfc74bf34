package tree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"
)

// Unpack makes what the plain tar r holds below dir, which must exist, and reads r
// to its end. It checks as Check does, without limits. Files can be read and written
// by their owner whatever their mode says, folders entered too; set-id bits are
// dropped, times kept, owners left to be the caller's. What exists already under a
// name of the tar gives way to it, except a folder that is not empty. Nothing may
// change dir meanwhile.
//
// Errors of the file system are wrapped, so that errors.Is finds ENOSPC.
func Unpack(dir string, r io.Reader) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer root.Close()
	u := &unpacker{root: root, parent: root, buf: make([]byte, bufSize)}
	defer u.leave()
	s := newSource(r, nil)
	if err := newChecker("", Limits{}).walkTar(s, s, u.make); err != nil {
		return err
	}
	if err := s.drain(noLimit); err != nil {
		return err
	}
	return u.setTimes()
}

type unpacker struct {
	root   *os.Root
	parent *os.Root // of the entry before: most files share it, which saves a walk each
	name   string   // of parent; "" for root
	buf    []byte
	dirs   []datedDir
}

// A datedDir gets its time when everything in it has been made.
type datedDir struct {
	name  string
	mtime time.Time
}

// make makes e and is a visitor.
func (u *unpacker) make(e *entry, content io.Reader) error {
	dir, base := path.Split(e.name)
	if err := u.enter(path.Clean(dir)); err != nil {
		return fmt.Errorf("unpack %s: %w", quote(e.name), err)
	}
	var err error
	switch e.kind {
	case isDir:
		err = u.mkdir(e, base)
	case isFile:
		return u.file(e, base, content)
	case isSymlink:
		err = u.anew(base, func() error { return u.parent.Symlink(e.link, base) })
	case isHard:
		err = u.anew(base, func() error { return u.root.Link(e.link, e.name) })
	}
	if err != nil {
		return fmt.Errorf("unpack %s: %w", quote(e.name), err)
	}
	return nil
}

// enter makes dir, and what is missing above it, the parent.
func (u *unpacker) enter(dir string) error {
	if dir == "." {
		dir = ""
	}
	if dir == u.name {
		return nil
	}
	u.leave()
	if dir == "" {
		return nil
	}
	next, err := u.root.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = u.root.MkdirAll(dir, 0o755); err == nil {
			next, err = u.root.OpenRoot(dir)
		}
	}
	if err != nil {
		return err
	}
	u.parent, u.name = next, dir
	return nil
}

// leave makes the root the parent.
func (u *unpacker) leave() {
	if u.parent != u.root {
		u.parent.Close()
	}
	u.parent, u.name = u.root, ""
}

// anew calls create, once more if something was in the way and could be removed.
func (u *unpacker) anew(base string, create func() error) error {
	err := create()
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := u.parent.Remove(base); err != nil {
		return err
	}
	return create()
}

func (u *unpacker) mkdir(e *entry, base string) error {
	mode := fs.FileMode(e.mode).Perm() | 0o700
	u.dirs = append(u.dirs, datedDir{e.name, e.mtime})
	if fi, err := u.parent.Lstat(base); err != nil || !fi.IsDir() {
		if err := u.anew(base, func() error { return u.parent.Mkdir(base, mode) }); err != nil {
			return err
		}
	}
	return u.parent.Chmod(base, mode) // against the umask
}

func (u *unpacker) file(e *entry, base string, content io.Reader) error {
	mode := fs.FileMode(e.mode).Perm() | 0o600
	var f *os.File
	err := u.anew(base, func() (err error) {
		f, err = u.parent.OpenFile(base, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		return err
	})
	if err == nil {
		err = f.Chmod(mode) // against the umask
	}
	if err != nil {
		return fmt.Errorf("unpack %s: %w", quote(e.name), err)
	}
	// The wrapper hides os.File's ReadFrom, which would bring its own small buffer.
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, content, u.buf)
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = u.parent.Chtimes(base, e.mtime, e.mtime)
	}
	if err != nil && !refused(err) {
		return fmt.Errorf("unpack %s: %w", quote(e.name), err)
	}
	return err
}

// setTimes dates the folders, the deepest first.
func (u *unpacker) setTimes() error {
	for i := len(u.dirs) - 1; i >= 0; i-- {
		d := u.dirs[i]
		if err := u.root.Chtimes(d.name, d.mtime, d.mtime); err != nil {
			return fmt.Errorf("unpack %s: %w", quote(d.name), err)
		}
	}
	return nil
}
