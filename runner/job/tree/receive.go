package tree

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// ReadWriterAt is the file an upload is written to: bytes are appended by Write,
// the first one at offset 0, and read back by ReadAt.
type ReadWriterAt interface {
	io.Writer
	io.ReaderAt
}

// Receive copies r to file to its end and checks it on the way. want names a file
// at the top whose contents to keep, or is "". If nothing at all comes, that is no
// error but Summary.Empty.
//
// After an error file may hold any part of r, and r may not have been read to its
// end. A [*RefusedError] is the sender's fault; an error of r or file comes back as
// it is. A zip is checked once it is all there, for its directory is at its end.
func Receive(r io.Reader, file ReadWriterAt, want string, lim Limits) (Summary, error) {
	c := newChecker(want, lim)
	outer := newSource(r, file)
	format, err := sniff(outer)
	if err != nil {
		return Summary{}, err
	}
	switch format {
	case "":
		return Summary{Empty: true}, nil
	case "zip":
		if err := outer.drain(noLimit); err != nil {
			return Summary{}, err
		}
		err = walkZip(file, outer.total, c, c.keep)
	default:
		err = c.stream(outer, format, c.keep)
	}
	if err != nil {
		return Summary{}, err
	}
	c.sum.Format = format
	return c.summary(), nil
}

// Check reads r to its end and checks it as Receive does, except that it knows no
// zip and keeps no copy.
func Check(r io.Reader, want string, lim Limits) (Summary, error) {
	c := newChecker(want, lim)
	format, err := c.tarFamily(r, c.keep)
	if err != nil {
		return Summary{}, err
	}
	if c.sum.Format = format; format == "" {
		return Summary{Empty: true}, nil
	}
	return c.summary(), nil
}

// Normalise writes the upload in the first size bytes of file to w as a plain tar
// that every tar reads alike, with clean names and nothing a box could choke on. It
// checks everything again, so it may be given a file that was never received.
func Normalise(w io.Writer, file io.ReaderAt, size int64, lim Limits) error {
	c := newChecker("", lim)
	out := newEmitter(w)
	outer := newSource(io.NewSectionReader(file, 0, size), nil)
	format, err := sniff(outer)
	switch {
	case err != nil:
	case format == "zip":
		err = walkZip(file, size, c, out.emit)
	case format != "":
		err = c.stream(outer, format, out.emit)
	}
	if err != nil {
		return err
	}
	return out.close()
}

// Extract writes to w a tar of what r, a tar of any compression, holds at path and
// below; "." is all of it. It reports false, and writes nothing, if that is nothing. A
// hard link whose first name lies outside path cannot be copied and is refused.
func Extract(w io.Writer, r io.Reader, path string) (found bool, err error) {
	clean, why := cleanName(path)
	if why != "" {
		return false, &RefusedError{Entry: path, Why: why}
	}
	inside := func(name string) bool {
		return clean == "" || name == clean || strings.HasPrefix(name, clean+"/")
	}
	out := newEmitter(w)
	_, err = newChecker("", Limits{}).tarFamily(r, func(e *entry, content io.Reader) error {
		if !inside(e.name) {
			return nil
		}
		if e.kind == isHard && !inside(e.link) {
			return e.refuse("is another name of %s: ask for that one", quote(e.link))
		}
		found = true
		return out.emit(e, content)
	})
	if err != nil || !found {
		return found, err
	}
	return true, out.close()
}

// A visitor is shown each admitted entry. It may leave content unread, but only
// read it until it returns. Its errors come back as they are.
type visitor func(e *entry, content io.Reader) error

// keep holds on to the wanted file.
func (c *checker) keep(e *entry, content io.Reader) error {
	if c.want == "" || e.name != c.want || e.kind != isFile {
		return nil
	}
	if e.size > MaxWanted {
		return &RefusedError{Entry: e.raw, Why: "is larger than " + Size(MaxWanted), TooBig: true}
	}
	var err error
	c.sum.Wanted, err = io.ReadAll(content)
	return err
}

// tarFamily walks r, which must be a tar of any compression, or empty.
func (c *checker) tarFamily(r io.Reader, visit visitor) (format string, err error) {
	outer := newSource(r, nil)
	format, err = sniff(outer)
	switch {
	case err != nil || format == "":
		return "", err
	case format == "zip":
		return "", &RefusedError{Why: "this is a zip, where only a tar will do"}
	}
	return format, c.stream(outer, format, visit)
}

// maxWindow bounds the memory a zstd stream can ask for; it is what `zstd --long`
// uses and every zstd decodes by default.
const maxWindow = 128 << 20

// maxPadding is how much may follow the end of a compressed tar: a generous record.
const maxPadding = 64 << 20

// stream walks a tar of any compression, to the end of outer.
func (c *checker) stream(outer *source, format string, visit visitor) error {
	plain, padding := outer, int64(noLimit)
	switch format {
	case "tar.gz":
		z, err := gzip.NewReader(bufio.NewReaderSize(outer, bufSize))
		if err != nil {
			return explain(err, outer)
		}
		defer z.Close()
		plain, padding = newSource(z, nil), maxPadding
	case "tar.zst":
		z, err := zstd.NewReader(outer, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return explain(err, outer)
		}
		defer z.Close()
		plain, padding = newSource(z, nil), maxPadding
	}
	plain.max = rawLimit(c.lim)
	if plain != outer {
		if err := sniffInner(plain, outer); err != nil {
			return err
		}
	}
	if err := c.walkTar(plain, outer, visit); err != nil {
		return err
	}
	if err := plain.drain(padding); err != nil {
		return explain(err, outer, plain)
	}
	return outer.drain(noLimit)
}

// rawLimit bounds a tar as a stream, because headers that make no entry are free of
// the other limits: the contents, and 16 KiB for the headers of each entry.
func rawLimit(lim Limits) int64 {
	if lim.Unpacked <= 0 || lim.Entries <= 0 {
		return 0
	}
	const each = 16 << 10
	if int64(lim.Entries) > (math.MaxInt64-lim.Unpacked-maxPadding)/each {
		return 0
	}
	return lim.Unpacked + maxPadding + int64(lim.Entries)*each
}

// walkTar walks the tar in s up to its end, admits every entry and shows it to
// visit. below is what s reads from, if that is a source of its own.
func (c *checker) walkTar(s, below *source, visit visitor) error {
	tr := tar.NewReader(s)
	for {
		s.zero = false
		h, err := tr.Next()
		if err == io.EOF && !s.zero && s.failed() == nil {
			err = io.ErrUnexpectedEOF
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil && !errors.Is(err, tar.ErrInsecurePath): // which our own check covers
			return explain(err, below, s)
		}
		e, err := fromHeader(h)
		if err != nil {
			return err
		}
		if e == nil {
			continue
		}
		ok, err := c.admit(e)
		if err != nil {
			return err
		}
		content := &explained{tr, func(err error) error { return explain(err, below, s) }}
		if ok {
			if err := visit(e, content); err != nil {
				return err
			}
		}
		if sparse(h) { // only reading shows whether map and data agree; holes cost a memclr
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, content, make([]byte, bufSize)); err != nil {
				return err
			}
		}
	}
}

// v7Reg is how tars from before POSIX mark a regular file.
const v7Reg = '\x00'

// fromHeader returns nil for a header that makes nothing.
func fromHeader(h *tar.Header) (*entry, error) {
	e := &entry{raw: h.Name, mode: h.Mode & 0o777, mtime: h.ModTime, link: h.Linkname}
	switch h.Typeflag {
	case tar.TypeReg, v7Reg, tar.TypeCont, tar.TypeGNUSparse:
		e.kind, e.size, e.link = isFile, h.Size, ""
		if strings.HasSuffix(h.Name, "/") { // a folder, as V7 wrote them
			if h.Size != 0 {
				return nil, e.refuse("is a file with the name of a folder")
			}
			e.kind = isDir
		}
	case tar.TypeDir:
		e.kind, e.link = isDir, ""
	case tar.TypeSymlink:
		e.kind = isSymlink
	case tar.TypeLink:
		e.kind = isHard
	case tar.TypeXGlobalHeader, 'V': // git's commit; a volume label
		return nil, nil
	default:
		return nil, e.refuse("is %s", oddKind(h.Typeflag))
	}
	return e, nil
}

func oddKind(flag byte) string {
	switch flag {
	case tar.TypeChar, tar.TypeBlock:
		return "a device"
	case tar.TypeFifo:
		return "a FIFO"
	case 'M':
		return "the rest of a file from another volume"
	case 'D':
		return "a folder of an incremental dump"
	}
	return fmt.Sprintf("of the unknown kind %q", flag)
}

func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// explained gives the errors of a reader their words.
type explained struct {
	r       io.Reader
	explain func(error) error
}

func (x *explained) Read(p []byte) (int, error) {
	n, err := x.r.Read(p)
	if err != nil && err != io.EOF {
		err = x.explain(err)
	}
	return n, err
}

// explain tells whose fault err is. What ended one of the sources, the lowest first,
// comes back as it is if it is an error of the reader or writer below; what a
// decoder found wrong with the bytes is a refusal.
func explain(err error, sources ...*source) error {
	if lowest := sources[0].failed(); lowest != nil {
		return lowest
	}
	for _, s := range sources {
		if refused(s.failed()) {
			return s.err
		}
	}
	if refused(err) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return &RefusedError{Why: "the archive is cut short", Hint: "send it again; if the disk was full or tar reported an error, mend that first"}
	}
	const hint = "in PowerShell, pipes change bytes: use cmd /c \"tar cf - . | ssh …\""
	switch {
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return &RefusedError{Why: "its zstd window is larger than " + Size(maxWindow), Hint: "compress without --ultra and --long", TooBig: true}
	case errors.Is(err, tar.ErrHeader), errors.Is(err, zip.ErrFormat):
		return &RefusedError{Why: "the archive is damaged: something in it is no header", Hint: hint}
	}
	return &RefusedError{Why: "the archive is damaged: " + err.Error(), Hint: hint}
}

// sniff returns the format of what s begins with, or "" if s is empty.
func sniff(s *source) (string, error) {
	head, err := s.peek(blockSize)
	switch {
	case err != nil:
		return "", err
	case s.failed() != nil && len(head) < blockSize:
		return "", s.err
	case len(head) == 0:
		return "", nil
	case isTar(head):
		return "tar", nil
	}
	for _, m := range magics {
		if !bytes.HasPrefix(head, []byte(m.magic)) {
			continue
		}
		if m.format != "" {
			return m.format, nil
		}
		return "", &RefusedError{Why: "this is " + m.name + ", not a tar", Hint: m.hint}
	}
	return "", &RefusedError{Why: looksLike(head), Hint: sendHint}
}

// sniffInner makes sure that a tar is what was compressed.
func sniffInner(plain, outer *source) error {
	head, err := plain.peek(blockSize)
	switch {
	case err != nil:
		return explain(err, outer, plain)
	case plain.failed() != nil && len(head) < blockSize:
		return explain(plain.err, outer, plain)
	case isTar(head):
		return nil
	case len(head) == 0:
		return &RefusedError{Why: "nothing was compressed", Hint: sendHint}
	}
	return &RefusedError{Why: "what was compressed is not a tar", Hint: sendHint}
}

const (
	sendHint = "send the folder as a tar: tar cf - . | ssh …"
	packHint = "use gzip or zstd: tar czf - . | ssh …"
)

// magics are tried in order. Those with a format are taken, the others named.
var magics = []struct{ magic, format, name, hint string }{
	{"\x1f\x8b", "tar.gz", "", ""},
	{"\x28\xb5\x2f\xfd", "tar.zst", "", ""},
	{"\x50\x2a\x4d\x18", "tar.zst", "", ""}, // pzstd begins with a skippable frame
	{"PK\x03\x04", "zip", "", ""},
	{"PK\x05\x06", "zip", "", ""}, // an empty one
	{"\xfd7zXZ\x00", "", "xz", packHint},
	{"BZh", "", "bzip2", packHint},
	{"LZIP", "", "lzip", packHint},
	{"\x04\x22\x4d\x18", "", "lz4", packHint},
	{"\x5d\x00\x00", "", "lzma", packHint},
	{"\x1f\x9d", "", "compress (.Z)", packHint},
	{"7z\xbc\xaf\x27\x1c", "", "7z", packHint},
	{"Rar!", "", "rar", packHint},
	{"PK\x07\x08", "", "a part of a split zip", sendHint},
	{"070701", "", "cpio", sendHint},
	{"070707", "", "cpio", sendHint},
	{"!<arch>", "", "ar", sendHint},
	{"%PDF", "", "a PDF", sendHint},
	{"\x7fELF", "", "a program", sendHint},
	{"\x89PNG", "", "a picture", sendHint},
	{"\xff\xd8\xff", "", "a picture", sendHint},
	{"# v2 git bundle", "", "a git bundle", "git archive HEAD | ssh …"},
	{"# v3 git bundle", "", "a git bundle", "git archive HEAD | ssh …"},
	{"\xff\xfe", "", "UTF-16 text", "PowerShell made text of the tar: use cmd /c \"tar cf - . | ssh …\""},
}

// isTar tells a tar by its first block: its magic, its checksum, or its end.
func isTar(head []byte) bool {
	if len(head) < blockSize {
		return false
	}
	if string(head[257:262]) == "ustar" || bytes.Equal(head, zeroBlock[:]) {
		return true
	}
	var sum, want int64
	for i, b := range head {
		if i >= 148 && i < 156 {
			b = ' '
		}
		sum += int64(b)
	}
	_, err := fmt.Sscanf(strings.Trim(string(head[148:156]), " \x00"), "%o", &want)
	return err == nil && sum == want
}

func looksLike(head []byte) string {
	low := strings.ToLower(strings.TrimSpace(string(head)))
	switch {
	case strings.HasPrefix(low, "<!doctype") || strings.HasPrefix(low, "<html"):
		return "this is a web page, not a tar"
	case isText(head):
		return "this is plain text, not a tar"
	}
	return "this is no archive that raid knows"
}

func isText(b []byte) bool {
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError && n == 1 && len(b) >= utf8.UTFMax || r < ' ' && !strings.ContainsRune("\t\n\r\f\x1b", r) {
			return false
		}
		b = b[n:]
	}
	return true
}

// An emitter writes entries as a plain tar.
type emitter struct {
	w   *bufio.Writer
	tw  *tar.Writer
	buf []byte
}

func newEmitter(w io.Writer) *emitter {
	bw := bufio.NewWriterSize(w, bufSize)
	return &emitter{w: bw, tw: tar.NewWriter(bw), buf: make([]byte, bufSize)}
}

// maxTime is the last second that an octal header field holds; pax could go on, but
// no file's time means to be beyond the year 2242.
const maxTime = 1<<33 - 1

func (x *emitter) emit(e *entry, content io.Reader) error {
	if err := x.tw.WriteHeader(header(e)); err != nil {
		return fmt.Errorf("write tar: %w", err)
	}
	for left := e.size; left > 0; {
		n, err := content.Read(x.buf[:min(left, bufSize)])
		left -= int64(n)
		if _, err := x.tw.Write(x.buf[:n]); err != nil {
			return fmt.Errorf("write tar: %w", err)
		}
		if err == io.EOF && left > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

// header returns what every tar is to say of e: no owner, and times that fit ustar.
func header(e *entry) *tar.Header {
	seconds := min(max(e.mtime.Unix(), 0), maxTime)
	h := &tar.Header{Name: e.name, Linkname: e.link, Size: e.size, Mode: e.mode,
		ModTime: time.Unix(seconds, 0), Typeflag: tar.TypeReg}
	switch e.kind {
	case isDir:
		h.Typeflag, h.Name = tar.TypeDir, e.name+"/"
	case isSymlink:
		h.Typeflag = tar.TypeSymlink
	case isHard:
		h.Typeflag = tar.TypeLink
	}
	return h
}

func (x *emitter) close() error {
	if err := x.tw.Close(); err != nil {
		return fmt.Errorf("write tar: %w", err)
	}
	if err := x.w.Flush(); err != nil {
		return fmt.Errorf("write tar: %w", err)
	}
	return nil
}
