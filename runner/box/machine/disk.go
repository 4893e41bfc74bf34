package machine

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

// Parts are the writable folders of a box and where it sees them, but for its home,
// which the engine puts where its user expects one.
var Parts = [...]struct{ Name, At string }{{"src", "/src"}, {"build", "/build"}, {"tmp", "/tmp"}, {"vartmp", "/var/tmp"}}

// Home is the name of one more folder, beside Parts.
const Home = "home"

const (
	MinDisk    = 4 << 20         // less than this mkfs refuses, or leaves nothing
	SampleTime = 2 * time.Second // between two measurements of what is not on an image
)

// Disks makes the disks of one engine's boxes.
type Disks struct {
	Boxes string // a folder for each box is made here
	UID   int    // whose the folders of boxes are; -1 to keep our own
	// Images says that disks are images. Without root, plain folders are all there is.
	Images bool

	in        *Namespace // where disks are mounted
	templates templates
}

// NewDisks makes, below the folder run, what disks need, and finds out whether they
// can be images; noImages says why not. It first removes the disks that an earlier
// process left there: no box of its may still run. Images are mounted in the namespace
// in, which has to see run as it is here.
func NewDisks(ctx context.Context, run string, uid int, in *Namespace) (d *Disks, noImages, err error) {
	d = &Disks{Boxes: filepath.Join(run, "boxes"), UID: uid, in: in}
	d.templates.dir = filepath.Join(run, "templates")
	for dir, mode := range map[string]os.FileMode{d.Boxes: 0o711, d.templates.dir: 0o700} {
		if err := MakeDir(dir, mode); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, nil, err
		}
	}
	if err := d.Sweep(ctx, func(string) bool { return false }); err != nil {
		return nil, nil, fmt.Errorf("remove old disks: %w", err)
	}
	if os.Geteuid() != 0 {
		return d, errors.New("not root"), nil
	}
	d.Images = true
	probe, noImages := d.New(ctx, "probe", MinDisk)
	if noImages == nil {
		noImages = probe.Remove()
	}
	d.Images = noImages == nil
	return d, noImages, nil
}

// A Disk is a box's writable folders: on a file system image of their own, or, where
// no image can be mounted, in a plain folder that is measured now and then.
//
// The image is mounted for a moment only. Once the box has bound its folders, the
// host's mount is detached and image and mount point are unlinked: the box, and root
// here, hold what is left. So the kernel itself cleans up after a runner that died.
type Disk struct {
	Dir   string // holds the folders, until LetGo
	Image bool   // the limit is hard

	home  string // the box's folder
	in    *Namespace
	shown []string // where else something is mounted
	root  *os.File // Dir, open: only the namespace shows what is mounted there
	uid   int
	size  int64        // bytes it was made with, 0 for no limit
	limit atomic.Int64 // bytes, size or less
	over  atomic.Bool
}

// New makes the disk of a box. limit 0 means a plain folder without a limit. After an
// error nothing is left.
func (ds *Disks) New(ctx context.Context, name string, limit int64) (*Disk, error) {
	return ds.NewFor(ctx, name, limit, ds.UID)
}

// NewFor is New for a box of another user than UID.
func (ds *Disks) NewFor(ctx context.Context, name string, limit int64, uid int) (d *Disk, err error) {
	home := filepath.Join(ds.Boxes, name)
	d = &Disk{home: home, in: ds.in, Dir: filepath.Join(home, "disk"), size: limit, uid: uid}
	d.limit.Store(limit)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Remove())
			d = nil
		}
	}()
	if err := MakeDir(home, 0o711); err != nil {
		return d, err
	}
	if err := MakeDir(d.Dir, 0o755); err != nil {
		return d, err
	}
	if limit > 0 && ds.Images {
		if err := d.mount(ctx, &ds.templates); err != nil {
			return d, err
		}
	}
	if d.root == nil {
		if d.root, err = os.Open(d.Dir); err != nil {
			return d, err
		}
	}
	for _, p := range Parts {
		if _, err := d.Folder(p.Name); err != nil {
			return d, err
		}
	}
	_, err = d.Folder(Home)
	return d, err
}

// Folder makes one more folder on the disk and returns its path, as the namespace has
// it. It belongs to the boxes' user; a temporary one is everybody's, as programs expect.
func (d *Disk) Folder(name string) (string, error) {
	mode := os.FileMode(0o755)
	if strings.HasSuffix(name, "tmp") {
		mode = 0o777 | os.ModeSticky
	}
	path, here := filepath.Join(d.Dir, name), fmt.Sprintf("/proc/self/fd/%d/%s", d.root.Fd(), name)
	if err := MakeDir(here, mode); err != nil {
		return "", err
	}
	if d.uid < 0 {
		return path, nil
	}
	return path, os.Chown(here, d.uid, d.uid)
}

// Show returns a path at which the namespace has, until LetGo, what is at host here.
func (d *Disk) Show(host string) (string, error) {
	if d.in.Sees(host) {
		return host, nil
	}
	at := filepath.Join(d.home, fmt.Sprintf("shown%d", len(d.shown)))
	if err := MakeDir(at, 0o711); err != nil {
		return "", err
	}
	d.shown = append(d.shown, at)
	if err := d.in.show(host, at); err != nil {
		return "", fmt.Errorf("show %s to the engine: %w", host, err)
	}
	return at, nil
}

// mount mounts a fresh image on d.Dir.
func (d *Disk) mount(ctx context.Context, ts *templates) error {
	template, err := ts.get(ctx, max(d.size, MinDisk))
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
	err = d.in.Do(func() (err error) {
		// noinit_itable: no kernel thread that fills tables nobody will use.
		err = unix.Mount(loop.Name(), d.Dir, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "noinit_itable")
		if err != nil {
			return err
		}
		d.Image = true
		d.root, err = os.Open(d.Dir)
		return err
	})
	if err != nil {
		return fmt.Errorf("mount disk image: %w", err)
	}
	return nil
}

// Shrink lowers the limit of a disk that nobody has written to. A file that only root
// can reach takes up the rest of an image: it is all extents and no data. A disk cannot
// grow beyond the size it was made with.
func (d *Disk) Shrink(limit int64) error {
	if limit == d.limit.Load() {
		return nil
	}
	if limit <= 0 || limit > d.size {
		return fmt.Errorf("a disk of %d bytes cannot have %d", d.size, limit)
	}
	if d.Image {
		if err := d.fill(d.size - limit); err != nil {
			return fmt.Errorf("shrink the disk: %w", err)
		}
	}
	d.limit.Store(limit)
	return nil
}

// fill makes the ballast n bytes long.
func (d *Disk) fill(n int64) error {
	fd, err := unix.Openat(int(d.root.Fd()), "ballast", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, n); err != nil || n == 0 {
		return err
	}
	return unix.Fallocate(fd, 0, 0, n)
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

// LetGo gives up the host's view of the image, and of what was shown: the box has its own.
func (d *Disk) LetGo() error {
	if err := d.hide(); err != nil {
		return err
	}
	if !d.Image {
		return nil
	}
	if err := d.in.unmount(d.Dir); err != nil {
		return fmt.Errorf("detach %s: %w", d.Dir, err)
	}
	return errors.Join(os.Remove(d.Dir), os.Remove(d.home))
}

// hide takes back what was shown.
func (d *Disk) hide() error {
	for ; len(d.shown) > 0; d.shown = d.shown[1:] {
		if err := d.in.unmount(d.shown[0]); err != nil && err != unix.EINVAL {
			return fmt.Errorf("detach %s: %w", d.shown[0], err)
		}
		if err := os.Remove(d.shown[0]); err != nil {
			return err
		}
	}
	return nil
}

// leftOver is more than a full file system may have left of what it kept back for
// writes that were under way.
const leftOver = 64 << 10

// Full reports whether the limit was hit.
func (d *Disk) Full() bool {
	var s unix.Statfs_t
	if !d.Image || unix.Fstatfs(int(d.root.Fd()), &s) != nil {
		return d.over.Load()
	}
	return int64(s.Bavail)*s.Bsize < leftOver || s.Ffree == 0
}

// Watch measures a plain folder until ctx is done, and calls over once when it holds
// more than it may.
func (d *Disk) Watch(ctx context.Context, over func()) {
	if d.Image || d.size <= 0 {
		return
	}
	full := func() bool { return Used(ctx, d.Dir, d.limit.Load()) > d.limit.Load() }
	Sample(ctx, full, func() { d.over.Store(true); over() })
}

// Sample asks now and then whether something is full, until ctx is done or it is; then
// it calls over.
func Sample(ctx context.Context, full func() bool, over func()) {
	tick := time.NewTicker(SampleTime)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if full() {
			over()
			return
		}
	}
}

// maxDepth is where Used gives up and calls a tree too large: each level deeper
// makes every look at it slower.
const maxDepth = 512

// Used adds up the blocks below dir, and stops beyond enough. A tree that changes
// under it cannot lead it outside: os.Root follows no link out of dir.
func Used(ctx context.Context, dir string, enough int64) (n int64) {
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

// Remove removes all that is left of the disk. No process may use it any more.
func (d *Disk) Remove() error {
	if err := d.hide(); err != nil {
		return err // what is somebody else's must not be removed with the rest
	}
	var errs []error
	if d.Image {
		if err := d.in.unmount(d.Dir); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("unmount %s: %w", d.Dir, err))
		}
	}
	if d.root != nil {
		d.forget()
		// The last reference: the file system goes with it, and the loop device.
		errs = append(errs, d.root.Close())
	}
	return errors.Join(append(errs, RemoveTree(d.home))...)
}

// forget has the kernel drop what the job wrote instead of writing it to a disk that
// is about to vanish: with 1 GiB of it 0.1 s instead of 2 to 4. Best effort.
func (d *Disk) forget() {
	if !d.Image {
		return
	}
	const noLogFlush = 2 // EXT4_GOING_FLAGS_NOLOGFLUSH
	// EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32); the bits of _IOR differ between machines.
	request := uint(unix.FS_IOC_GETFLAGS)&0xe0000000 | 4<<16 | 'X'<<8 | 125
	unix.IoctlSetPointerInt(int(d.root.Fd()), request, noLogFlush)
}

// RemoveTree removes a folder whatever a job left in it. Without root, folders that
// their owner closed have to be opened first.
func RemoveTree(dir string) error {
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

// Sweep removes the folders, and the mounts in them, of boxes that are not open.
func (ds *Disks) Sweep(ctx context.Context, open func(name string) bool) error {
	var errs []error
	for _, name := range Folders(ds.Boxes) {
		if ctx.Err() != nil {
			return errors.Join(append(errs, context.Cause(ctx))...)
		}
		if !open(name) {
			errs = append(errs, ds.clear(filepath.Join(ds.Boxes, name)))
		}
	}
	return errors.Join(errs...)
}

// clear removes a folder once nothing is mounted in it: a team's cache may be.
func (ds *Disks) clear(home string) error {
	if err := ds.in.unmountBelow(home); err != nil {
		return err
	}
	return RemoveTree(home)
}

// unmountBelow unmounts what a runner that died while it started a box left there.
func unmountBelow(dir string) error {
	mounts, err := Mounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range mounts {
		if m.At == dir || strings.HasPrefix(m.At, dir+"/") {
			errs = append(errs, unix.Unmount(m.At, unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
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
	out, err := exec.CommandContext(ctx, MakeFS(), "-q", "-F", "-m", "0", "-i", perInode,
		"-O", "^has_journal,^resize_inode", "-E", "lazy_itable_init=1,nodiscard", tmp).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return name, os.Rename(tmp, name)
}

// MakeFS finds mkfs.ext4 although sbin is not on every PATH.
func MakeFS() string {
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

// MakeDir makes a folder with exactly these permissions, whatever the umask.
func MakeDir(dir string, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}
