package tree

import (
	"archive/zip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/klauspost/compress/flate"
)

// walkZip walks the zip in the first size bytes of file as walkTar walks a tar. All
// contents are read, so that lengths and checksums are known to be right.
func walkZip(file io.ReaderAt, size int64, c *checker, visit visitor) error {
	dir := &directory{r: file, left: directoryLimit(c.lim)}
	z, err := zip.NewReader(dir, size)
	if err != nil && !errors.Is(err, zip.ErrInsecurePath) { // which our own check covers
		return dir.explain(err)
	}
	dir.left = noLimit
	z.RegisterDecompressor(zip.Deflate, flate.NewReader)
	for _, f := range z.File {
		if err := walkZipEntry(f, dir, c, visit); err != nil {
			return err
		}
	}
	return nil
}

func walkZipEntry(f *zip.File, dir *directory, c *checker, visit visitor) error {
	e, err := fromZip(f)
	if err != nil {
		return err
	}
	var content io.Reader = strings.NewReader("")
	if e.kind != isDir {
		r, err := f.Open()
		if err != nil {
			return dir.explain(err)
		}
		defer r.Close()
		content = &explained{&exactly{r, int64(f.UncompressedSize64)}, dir.explain}
	}
	if e.kind == isSymlink {
		target, err := io.ReadAll(io.LimitReader(content, maxTarget+1))
		if err != nil {
			return err
		}
		e.link = string(target)
	}
	ok, err := c.admit(e)
	if err != nil {
		return err
	}
	if ok {
		if err := visit(e, content); err != nil {
			return err
		}
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, content, make([]byte, 32<<10))
	return err
}

func fromZip(f *zip.File) (*entry, error) {
	e := &entry{raw: f.Name, mode: int64(f.Mode().Perm()), mtime: f.Modified}
	if fromDOS(f) {
		e.raw = strings.ReplaceAll(f.Name, `\`, "/") // .NET before 4.6.1 wrote these
		e.mode = 0o755                               // nobody there can say what may be run
	}
	switch mode := f.Mode(); {
	case strings.HasSuffix(e.raw, "/") && f.UncompressedSize64 != 0:
		return nil, e.refuse("is a file with the name of a folder")
	case strings.HasSuffix(e.raw, "/"), mode.IsDir():
		e.kind = isDir
	case mode&fs.ModeSymlink != 0:
		e.kind = isSymlink
	case mode.IsRegular():
		e.kind, e.size = isFile, int64(f.UncompressedSize64)
	default:
		return nil, e.refuse("is neither file, folder nor link")
	}
	if e.mode == 0 { // a tool that did not care
		e.mode = 0o644
	}
	switch {
	case e.size < 0:
		return nil, e.refuse("has an impossible size")
	case f.Flags&1 != 0:
		return nil, &RefusedError{Entry: e.raw, Why: "is encrypted", Hint: "make the zip without a password"}
	case f.Method != zip.Store && f.Method != zip.Deflate:
		return nil, &RefusedError{Entry: e.raw, Why: fmt.Sprintf("is compressed by method %d", f.Method),
			Hint: "make the zip with ordinary (deflate) compression"}
	}
	return e, nil
}

// fromDOS reports whether the system that made f has FAT or NTFS names.
func fromDOS(f *zip.File) bool {
	const fat, ntfs, vfat = 0, 10, 14
	creator := f.CreatorVersion >> 8
	return creator == fat || creator == ntfs || creator == vfat
}

// exactly reads n bytes of r and fails if r has more or less.
type exactly struct {
	r io.Reader
	n int64
}

func (x *exactly) Read(p []byte) (int, error) {
	n, err := x.r.Read(p)
	if x.n -= int64(n); x.n < 0 || err == io.EOF && x.n > 0 {
		return 0, zip.ErrFormat
	}
	return n, err
}

// A directory reads a zip. While the zip's directory is read it gives out a limited
// number of bytes: archive/zip makes an object of a few hundred bytes from each 46,
// as long as there are any, whatever count the end of the file claims.
type directory struct {
	r    io.ReaderAt
	left int64
	err  error // of r itself
}

var errDirectory = &RefusedError{Why: "the zip lists more files than are allowed", TooBig: true}

func directoryLimit(lim Limits) int64 {
	entries := int64(lim.Entries)
	if entries <= 0 || entries > 1<<20 {
		entries = 1 << 20
	}
	return 256<<10 + entries*256
}

func (d *directory) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 { // archive/zip takes offsets from the file as they are
		return 0, zip.ErrFormat
	}
	if d.left < int64(len(p)) {
		return 0, errDirectory
	}
	d.left -= int64(len(p))
	n, err := d.r.ReadAt(p, off)
	if err != nil && err != io.EOF {
		d.err = err
	}
	return n, err
}

func (d *directory) explain(err error) error {
	if d.err != nil {
		return fmt.Errorf("read zip: %w", d.err)
	}
	if errors.Is(err, zip.ErrFormat) {
		return &RefusedError{Why: "the zip is damaged or cut short", Hint: "send it again"}
	}
	return explain(err, &source{})
}
