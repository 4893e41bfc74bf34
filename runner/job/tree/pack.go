package tree

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// PackOptions say what goes into a tar.
type PackOptions struct {
	// Skip leaves out a file, or a folder with all that is in it. rel is its path
	// below the packed folder, with slashes. Nil skips nothing.
	Skip func(rel string, dir bool) bool
	// Limit bounds the bytes of all files together: a file beyond it is left out,
	// smaller ones after it may still fit. Zero means no limit.
	Limit int64
	// Entries bounds how many files, folders and links go in. Zero means no limit.
	Entries int
}

// Packed says what went into a tar. What Skip left out is not counted.
type Packed struct {
	Entries      int
	Bytes        int64
	LeftOut      int    // things that did not go in: too large, not to be read, no file, folder or link
	FirstLeftOut string // the first of them and why, fit for a terminal
	Changed      int    // files that changed while they were read: padded with zeros, or cut
}

// Pack writes a plain tar of what is in dir, the folder itself left out. Check
// accepts all it writes. Names are sorted, owners are 0, times in seconds: the same
// tree gives the same bytes. Further names of a file become hard links; symbolic
// links stay what they are and are never followed.
//
// dir may change meanwhile: what vanishes or cannot be read is left out, and a file
// that shrinks is padded to the length its header promised. The only errors are
// those of w and of dir itself.
func Pack(w io.Writer, dir string, o PackOptions) (Packed, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Packed{}, fmt.Errorf("pack: %w", err)
	}
	defer root.Close()
	p := &packer{o: o, out: newEmitter(w), first: make(map[fileID]string)}
	names, err := list(root)
	if err != nil {
		return Packed{}, fmt.Errorf("pack: %w", err)
	}
	if err := p.all(root, "", names); err != nil {
		return p.done, err
	}
	return p.done, p.out.close()
}

type packer struct {
	o     PackOptions
	out   *emitter
	done  Packed
	first map[fileID]string // first names of files that have several
}

// A fileID tells whether two names are one file.
type fileID struct{ dev, ino uint64 }

// list returns the names in root, sorted by their bytes.
func list(root *os.Root) ([]string, error) {
	d, err := root.Open(".")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}

// all packs the entries names of root, which is rel (with a slash, or "") below dir.
func (p *packer) all(root *os.Root, rel string, names []string) error {
	for _, base := range names {
		fi, err := root.Lstat(base)
		if err != nil {
			p.leaveOut(rel+base, err)
			continue
		}
		if p.o.Skip != nil && p.o.Skip(rel+base, fi.IsDir()) {
			continue
		}
		if _, why := cleanName(rel + base); why != "" {
			p.leaveOut(rel+base, errors.New(why))
			continue
		}
		if p.o.Entries > 0 && p.done.Entries >= p.o.Entries {
			p.leaveOut(rel+base, fmt.Errorf("over %d files and folders", p.o.Entries))
			continue
		}
		if err := p.one(root, rel, base, fi); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) one(root *os.Root, rel, base string, fi fs.FileInfo) error {
	e := &entry{name: rel + base, mode: int64(fi.Mode().Perm()), mtime: fi.ModTime()}
	switch mode := fi.Mode(); {
	case mode.IsDir():
		e.kind = isDir
		return p.dir(root, e, base)
	case mode&fs.ModeSymlink != 0:
		target, err := root.Readlink(base)
		if err != nil {
			p.leaveOut(e.name, err)
			return nil
		}
		e.kind, e.link, e.mode = isSymlink, target, 0o777
		return p.emit(e, nil)
	case mode.IsRegular():
		return p.file(root, e, base, fi)
	}
	p.leaveOut(e.name, errors.New("neither file, folder nor link"))
	return nil
}

func (p *packer) dir(root *os.Root, e *entry, base string) error {
	if err := p.emit(e, nil); err != nil {
		return err
	}
	sub, err := root.OpenRoot(base)
	if err != nil {
		p.leaveOut(e.name, err)
		return nil
	}
	defer sub.Close()
	names, err := list(sub)
	if err != nil {
		p.leaveOut(e.name, err)
	}
	return p.all(sub, e.name+"/", names)
}

func (p *packer) file(root *os.Root, e *entry, base string, fi fs.FileInfo) error {
	id, several := identify(fi)
	if name, ok := p.first[id]; several && ok {
		e.kind, e.link = isHard, name
		return p.emit(e, nil)
	}
	f, size, err := open(root, base, fi)
	if err != nil {
		p.leaveOut(e.name, err)
		return nil
	}
	defer f.Close()
	if p.o.Limit > 0 && size > p.o.Limit-p.done.Bytes {
		p.leaveOut(e.name, fmt.Errorf("%s, over the limit of %s for all", Size(size), Size(p.o.Limit)))
		return nil
	}
	e.kind, e.size = isFile, size
	content := &padded{r: f, left: size}
	if err := p.emit(e, content); err != nil {
		return err
	}
	if content.short || content.longer() {
		p.done.Changed++
	}
	if several {
		p.first[id] = e.name
	}
	return nil
}

// open opens the file that fi describes, and no other that took its name since:
// not waiting for the writer of a FIFO, nor through a link.
func open(root *os.Root, base string, fi fs.FileInfo) (*os.File, int64, error) {
	f, err := root.OpenFile(base, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	now, err := f.Stat()
	if err == nil && !os.SameFile(fi, now) {
		err = errors.New("replaced meanwhile")
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, now.Size(), nil
}

func (p *packer) emit(e *entry, content io.Reader) error {
	p.done.Entries++
	p.done.Bytes += e.size
	return p.out.emit(e, content)
}

func (p *packer) leaveOut(name string, why error) {
	if p.done.LeftOut++; p.done.LeftOut > 1 {
		return
	}
	if pe, ok := errors.AsType[*fs.PathError](why); ok {
		why = pe.Err
	}
	p.done.FirstLeftOut = fmt.Sprintf("%s (%v)", strings.Trim(quote(name), `"`), why)
}

// padded reads left bytes of r, and zeros for those that r has not.
type padded struct {
	r     io.Reader
	left  int64
	short bool
}

func (p *padded) Read(b []byte) (n int, err error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.left)]
	if !p.short {
		n, err = p.r.Read(b)
		p.short = err != nil
	}
	if p.short && n == 0 {
		clear(b)
		n = len(b)
	}
	p.left -= int64(n)
	return n, nil
}

// longer reports whether r has more than was promised.
func (p *padded) longer() bool {
	var b [1]byte
	n, _ := p.r.Read(b[:])
	return n > 0
}
