package blob

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Options are a folder's. The zero value keeps nothing free and says nothing.
type Options struct {
	Reserve      float64 // share of the disk that uploads leave free, 0 to 1
	ReserveBytes int64   // the same in bytes; the larger one counts
	// MakeRoom is called when that is not left, before an upload is refused. It removes
	// what can go and returns; it may call the folder.
	MakeRoom func()
	Logf     func(format string, args ...any)
}

// A disk is where uploads come to, until they are blobs.
type disk struct {
	dir string
	o   Options

	// passing: what comes here is durable elsewhere or nowhere, and the disk need not begin
	// with it. With luck it is gone before any of it was written.
	passing bool
}

func newDisk(dir string, o Options) (disk, error) {
	dir, err := filepath.Abs(dir)
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	if o.MakeRoom == nil {
		o.MakeRoom = func() {}
	}
	return disk{dir: dir, o: o}, err
}

const tempPrefix = "upload-"

// sweep removes uploads that nobody is writing any more: those named as ours.
func (d *disk) sweep() error {
	old, err := os.ReadDir(d.tmp())
	if err != nil {
		return err
	}
	for _, e := range old {
		if !strings.HasPrefix(e.Name(), tempPrefix) || !e.Type().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(d.tmp(), e.Name())); err != nil {
			return err
		}
		d.o.Logf("removed the unfinished upload %s", e.Name())
	}
	return nil
}

func (d *disk) tmp() string { return filepath.Join(d.dir, "tmp") }

// Free returns how many bytes of the disk an unprivileged user can still write, and
// how many it has.
func (d *disk) Free() (free, total int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(d.dir, &s); err != nil {
		return 0, 0, fmt.Errorf("statfs %s: %w", d.dir, err)
	}
	return int64(s.Bavail) * int64(s.Bsize), int64(s.Blocks) * int64(s.Bsize), nil
}

// room returns ErrNoSpace if less than the reserve is free and nobody can change that.
func (d *disk) room() error {
	err := d.enough()
	if errors.Is(err, ErrNoSpace) {
		d.o.MakeRoom()
		err = d.enough()
	}
	return err
}

func (d *disk) enough() error {
	free, total, err := d.Free()
	if err != nil {
		return err
	}
	if reserve := d.Reserve(total); free < reserve || free == 0 {
		return fmt.Errorf("%w: %d MiB free, %d MiB reserved", ErrNoSpace, free>>20, reserve>>20)
	}
	return nil
}

// Reserve returns how many bytes uploads leave free on a disk of total bytes.
func (d *disk) Reserve(total int64) int64 {
	return max(d.o.ReserveBytes, int64(d.o.Reserve*float64(total)))
}
