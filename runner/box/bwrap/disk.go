package bwrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A disk is a box's writable folders: on a file system image of their own, or, where
// no image can be mounted, in a plain folder that is measured now and then.
//
// The image is mounted for a moment only. Once the box has bound its folders, the
// host's mount is detached and image and mount point are unlinked: the box, and root
// here, hold what is left. So the kernel itself cleans up after a runner that died.
type disk struct {
	home  string   // the box's folder below RunDir/boxes
	dir   string   // holds the folders of parts
	root  *os.File // dir, open
	limit int64
	image bool
	over  atomic.Bool // a measured folder was over its limit
}

// parts are the writable folders and where the box sees them.
var parts = [...]struct{ name, at string }{
	{"src", "/src"}, {"build", "/build"}, {"tmp", "/tmp"}, {"vartmp", "/var/tmp"}, {"home", homeInBox},
}

const (
	minImage   = 4 << 20         // less than this mkfs refuses, or leaves nothing
	sampleTime = 2 * time.Second // between two measurements of a plain folder
)

// newDisk makes the folders of a box in home, which must not exist. limit 0 means a
// plain folder without a limit. The folders belong to uid, unless that is -1.
func (e *Engine) newDisk(ctx context.Context, home string, limit int64) (d *disk, err error) {
	d = &disk{home: home, dir: filepath.Join(home, "disk"), limit: limit}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.remove())
			d = nil
		}
	}()
	if err := makeDir(home, 0o711); err != nil {
		return d, err
	}
	if err := makeDir(d.dir, 0o755); err != nil {
		return d, err
	}
	if limit > 0 && e.images {
		if err := d.mount(ctx, e); err != nil {
			return d, err
		}
	}
	if d.root, err = os.Open(d.dir); err != nil {
		return d, err
	}
	for _, p := range parts {
		if err := makeDir(filepath.Join(d.dir, p.name), 0o755); err != nil {
			return d, err
		}
		if e.uid >= 0 {
			if err := os.Chown(filepath.Join(d.dir, p.name), e.uid, e.uid); err != nil {
				return d, err
			}
		}
	}
	return d, nil
}

// mount mounts a fresh image on d.dir.
func (d *disk) mount(ctx context.Context, e *Engine) error {
	template, err := e.templates.get(ctx, max(d.limit, minImage))
	if err != nil {
		return err
	}
	img, err := copySparse(filepath.Join(d.home, "image"), template)
	if err != nil {
		return fmt.Errorf("copy disk image: %w", err)
	}
	defer img.Close()
	defer os.Remove(img.Name()) // the loop device holds it from now on
	loop, err := attach(img)
	if err != nil {
		return fmt.Errorf("attach loop device: %w", err)
	}
	defer loop.Close() // it detaches itself with its last user
	// noinit_itable: no kernel thread that fills tables nobody will use.
	err = unix.Mount(loop.Name(), d.dir, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "noinit_itable")
	if err != nil {
		return fmt.Errorf("mount disk image: %w", err)
	}
	d.image = true
	return nil
}

// attach puts f behind a free loop device that frees itself.
func attach(f *os.File) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for range 100 { // another process may take the free one first
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, err
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		c := unix.LoopConfig{Fd: uint32(f.Fd())}
		c.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &c); err == nil {
			return dev, nil
		}
		dev.Close()
		if err != unix.EBUSY {
			return nil, err
		}
	}
	return nil, unix.EBUSY
}

// letGo gives up the host's view of the image: the box has its own.
func (d *disk) letGo() error {
	if !d.image {
		return nil
	}
	if err := unix.Unmount(d.dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach %s: %w", d.dir, err)
	}
	return errors.Join(os.Remove(d.dir), os.Remove(d.home))
}

// full reports whether the limit was hit.
func (d *disk) full() bool {
	var s unix.Statfs_t
	if !d.image || unix.Fstatfs(int(d.root.Fd()), &s) != nil {
		return d.over.Load()
	}
	return s.Bavail == 0 || s.Ffree == 0
}

// watch measures a plain folder until ctx is done, and calls over once when it holds
// more than it may.
func (d *disk) watch(ctx context.Context, over func()) {
	if d.image || d.limit <= 0 {
		return
	}
	tick := time.NewTicker(sampleTime)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if used(ctx, d.dir, d.limit) > d.limit {
			d.over.Store(true)
			over()
			return
		}
	}
}

// maxDepth is where used gives up and calls a tree too large: each level deeper
// makes every look at it slower.
const maxDepth = 512

// used adds up the blocks below dir, and stops beyond enough. A tree that changes
// under it cannot lead it outside: os.Root follows no link out of dir.
func used(ctx context.Context, dir string, enough int64) (n int64) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0
	}
	defer root.Close()
	fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone, or closed to us
		}
		if strings.Count(name, "/") > maxDepth {
			n = enough + 1
			return fs.SkipAll
		}
		if i, err := e.Info(); err == nil {
			if s, ok := i.Sys().(*syscall.Stat_t); ok {
				n += s.Blocks * 512 / max(1, int64(s.Nlink)) // a file with N names counts once
			}
		}
		if n > enough || ctx.Err() != nil {
			return fs.SkipAll
		}
		return nil
	})
	return n
}

// remove removes all that is left of the disk. No process may use it any more.
func (d *disk) remove() error {
	var errs []error
	if d.image {
		if err := unix.Unmount(d.dir, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("unmount %s: %w", d.dir, err))
		}
	}
	if d.root != nil {
		d.forget()
		// The last reference: the file system goes with it, and the loop device.
		errs = append(errs, d.root.Close())
	}
	return errors.Join(append(errs, removeTree(d.home))...)
}

// forget has the kernel drop what the job wrote instead of writing it to a disk that
// is about to vanish: with 1 GiB of it 0.1 s instead of 2 to 4. Best effort.
func (d *disk) forget() {
	if !d.image {
		return
	}
	const noLogFlush = 2 // EXT4_GOING_FLAGS_NOLOGFLUSH
	// EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32); the bits of _IOR differ between machines.
	request := uint(unix.FS_IOC_GETFLAGS)&0xe0000000 | 4<<16 | 'X'<<8 | 125
	unix.IoctlSetPointerInt(int(d.root.Fd()), request, noLogFlush)
}

// removeTree removes a folder whatever a job left in it. Without root, folders that
// their owner closed have to be opened first.
func removeTree(dir string) error {
	if os.RemoveAll(dir) == nil {
		return nil
	}
	if root, err := os.OpenRoot(dir); err == nil {
		openTree(root, ".")
		root.Close()
	}
	return os.RemoveAll(dir)
}

func openTree(root *os.Root, dir string) {
	root.Chmod(dir, 0o700)
	f, err := root.Open(dir)
	if err != nil {
		return
	}
	es, _ := f.ReadDir(-1)
	f.Close()
	for _, e := range es {
		if e.IsDir() {
			openTree(root, filepath.Join(dir, e.Name()))
		}
	}
}

// templates are empty file systems, one for each size, made when first asked for:
// mkfs costs more than copying the few MiB it wrote.
type templates struct {
	dir string
	mu  sync.Mutex // held while one is made
}

func (t *templates) get(ctx context.Context, size int64) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	size &^= 4095
	name := filepath.Join(t.dir, fmt.Sprintf("ext4-%d", size))
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	tmp := name + ".new"
	if err := os.WriteFile(tmp, nil, 0o600); err != nil {
		return "", err
	}
	defer os.Remove(tmp)
	if err := os.Truncate(tmp, size); err != nil {
		return "", err
	}
	perInode := "16384"
	if size < 1<<30 {
		perInode = "4096" // small disks hold small files
	}
	out, err := exec.CommandContext(ctx, mkfs(), "-q", "-F", "-m", "0", "-i", perInode,
		"-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", tmp).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return name, os.Rename(tmp, name)
}

// mkfs finds mkfs.ext4 although sbin is not on every PATH.
func mkfs() string {
	for _, dir := range [...]string{"/usr/sbin", "/sbin"} {
		if p := filepath.Join(dir, "mkfs.ext4"); unix.Access(p, unix.X_OK) == nil {
			return p
		}
	}
	return "mkfs.ext4"
}

// copySparse copies the parts of a file that hold data and returns the open copy.
func copySparse(to, from string) (dst *os.File, err error) {
	src, err := os.Open(from)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return nil, err
	}
	dst, err = os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(dst.Truncate(info.Size()), copyData(dst, src, info.Size())); err != nil {
		return nil, errors.Join(err, dst.Close(), os.Remove(to))
	}
	return dst, nil
}

func copyData(dst, src *os.File, size int64) error {
	for at := int64(0); at < size; {
		from, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO { // only a hole is left
			return nil
		}
		if err != nil {
			return err
		}
		to, err := unix.Seek(int(src.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		w := io.NewOffsetWriter(dst, from)
		if _, err := io.Copy(w, io.NewSectionReader(src, from, to-from)); err != nil {
			return err
		}
		at = to
	}
	return nil
}

// makeDir makes a folder with exactly these permissions, whatever the umask.
func makeDir(dir string, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}
