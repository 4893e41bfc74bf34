package backup

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A sink is where a backup goes.
type sink interface {
	// scratch returns a folder for files that are made for the backup.
	scratch() (string, error)
	// own takes a file of scratch.
	own(name string) error
	// take takes a file of the state folder, which may be gone: fs.ErrNotExist.
	take(path, name string) (n int64, linked bool, err error)
	// close gives the backup its name, on disk, or removes it. It is called once.
	close(keep bool) error
}

// partial is the end of a backup's name while it is being made.
const partial = ".partial"

func newSink(to string, stdout *os.File) (sink, error) {
	switch {
	case to == "-":
		return newTar(stdout, "")
	case strings.HasSuffix(to, ".tar"):
		if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s is there already", to)
		}
		f, err := os.OpenFile(to+partial, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, err
		}
		return newTar(f, to)
	}
	if entries, err := os.ReadDir(to); err == nil && len(entries) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is there already, and no empty folder", to)
	}
	f := &folder{to: filepath.Clean(to)}
	if err := os.RemoveAll(f.to + partial); err != nil { // of a backup that was killed
		return nil, err
	}
	return f, os.Mkdir(f.to+partial, 0o700)
}

// A folder is a state folder in the making. What lies on the same file system is linked:
// no upload, archive or log that a backup takes is ever written to again. Keys are not, for
// who gives a backup another owner or mode means no key that is in use.
type folder struct{ to string }

func (f *folder) scratch() (string, error) { return f.to + partial, nil }

func (f *folder) own(string) error { return nil }

func (f *folder) take(path, name string) (n int64, linked bool, err error) {
	to := filepath.Join(f.to+partial, name)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return 0, false, err
	}
	in, err := os.Open(path)
	if err != nil {
		return 0, false, err
	}
	defer in.Close()
	i, err := in.Stat()
	if err != nil {
		return 0, false, err
	}
	if strings.Contains(name, string(filepath.Separator)) {
		if err := os.Link(path, to); err == nil || errors.Is(err, fs.ErrNotExist) {
			return i.Size(), true, err
		}
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, i.Mode().Perm())
	if err != nil {
		return 0, false, err
	}
	n, err = io.Copy(out, in)
	return n, false, errors.Join(err, out.Close())
}

func (f *folder) close(keep bool) error {
	if !keep {
		return os.RemoveAll(f.to + partial)
	}
	if err := syncAll(f.to + partial); err != nil {
		return err
	}
	if err := os.Rename(f.to+partial, f.to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.to))
}

// syncAll brings the file system of a folder to its disk: one call for many files.
func syncAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Syncfs(int(d.Fd()))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// An archive is a tar of a state folder.
type archive struct {
	f   *os.File
	to  string // "" for none: f is somebody else's
	w   *tar.Writer
	dir string // scratch
}

func newTar(f *os.File, to string) (sink, error) {
	return &archive{f: f, to: to, w: tar.NewWriter(f)}, nil
}

func (a *archive) scratch() (dir string, err error) {
	if a.to != "" {
		dir = filepath.Dir(a.to)
	}
	a.dir, err = os.MkdirTemp(dir, "raid-backup-")
	return a.dir, err
}

func (a *archive) own(name string) error {
	_, _, err := a.take(filepath.Join(a.dir, name), name)
	return err
}

func (a *archive) take(path, name string) (n int64, linked bool, err error) {
	in, err := os.Open(path)
	if err != nil {
		return 0, false, err
	}
	defer in.Close()
	i, err := in.Stat()
	if err != nil {
		return 0, false, err
	}
	h := &tar.Header{Name: filepath.ToSlash(name), Mode: int64(i.Mode().Perm()), Size: i.Size(), ModTime: i.ModTime(), Typeflag: tar.TypeReg, Format: tar.FormatPAX}
	if err := a.w.WriteHeader(h); err != nil {
		return 0, false, err
	}
	n, err = io.CopyN(a.w, in, i.Size())
	return n, false, err
}

func (a *archive) close(keep bool) error {
	err := a.w.Close()
	if !keep {
		err = nil // it is half a tar anyway
	}
	if a.dir != "" {
		err = errors.Join(err, os.RemoveAll(a.dir))
	}
	switch {
	case a.to == "":
		return err
	case !keep || err != nil:
		return errors.Join(err, a.f.Close(), os.Remove(a.to+partial))
	}
	if err := errors.Join(a.f.Sync(), a.f.Close(), os.Rename(a.to+partial, a.to)); err != nil {
		return err
	}
	return syncDir(filepath.Dir(a.to))
}
