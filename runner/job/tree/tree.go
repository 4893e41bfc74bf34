// Package tree moves folders as tars, and trusts none of them.
//
// What a student pushes and what a box sends back pass the same checker:
//
//	Receive    copies an upload to a file and checks it on the way, in one pass
//	Check      checks a tar as it goes by
//	Normalise  turns an accepted upload of any format into the plain tar a box gets
//	Unpack     makes the files of a plain tar below a folder
//	Pack       makes a plain tar of a folder; the same tree gives the same bytes
//	Extract    copies one path out of a tar
//
// Uploads may be tar, tar.gz, tar.zst or zip; the first bytes decide, never a name.
// Everything real tools write is taken: V7, ustar, pax and GNU headers, git's
// global headers, sparse files (counted and passed on expanded), several gzip
// members, entries that come twice (the last one wins), links of any target.
//
// Refused, with a [*RefusedError]: names that are absolute, empty or hold "..";
// entries below a link or a file of the same archive; a file or link in the place
// of a folder; hard links to anything but an earlier file of the archive; devices,
// FIFOs and sockets; parts of multi-volume and incremental archives; encrypted
// zips; more than [Limits] allow, which a header's claim is enough for; and what
// is cut short. A tar ends with a block of zeros: without one it is taken for the
// work of a dying pipe even if the cut lies between two entries. What follows the
// end of a tar is kept but, as by tar itself, not looked at.
//
// The rule that a folder never stops being one is what makes the checks sound: an
// accepted name leads through real folders only, whenever it is looked up.
//
// Promises: memory does not grow with the size of a file; each name costs a hash,
// so Limits.Entries bounds it. Nothing is unpacked outside the folder given, nor
// through a link in it. Non-goals: owners, extended attributes, set-id bits and
// times finer than a second are dropped.
package tree

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits bound what an archive may become. Zero means no limit.
type Limits struct {
	Unpacked int64 // bytes of all files together, sparse ones expanded
	Entries  int   // files, folders and links, implied folders and repeated entries included
}

// Summary says what was in an archive.
type Summary struct {
	Format  string // "tar", "tar.gz", "tar.zst", "zip"; "" when Empty
	Entries int    // counted as Limits.Entries counts
	Bytes   int64  // counted as Limits.Unpacked counts
	Wanted  []byte // what the wanted file holds, if Found
	Found   bool   // the wanted file is there, at the top
	Linked  bool   // the wanted name is there, but as a link, so it was not read
	Nested  string // the one folder that everything, the wanted file included, lies in; else ""
	Empty   bool   // there was not a single byte
}

// MaxWanted is how many bytes the wanted file may have.
const MaxWanted = 1 << 20

// A RefusedError says why an archive is not taken. Its text is fit for terminals:
// names in it are quoted and cut to a readable length.
type RefusedError struct {
	Entry  string // the name as it stands in the archive, or "" if no entry is to blame
	Why    string // no full stop
	Hint   string // what to do about it, or ""
	TooBig bool   // a limit was exceeded
}

func (e *RefusedError) Error() string {
	if e.Entry == "" {
		return e.Why
	}
	return fmt.Sprintf("entry %s: %s", quote(e.Entry), e.Why)
}

const (
	maxPath      = 4096
	maxComponent = 255 // NAME_MAX
	maxDepth     = 256
	maxTarget    = 4095 // PATH_MAX without its NUL
)

type kind byte

const (
	isDir kind = iota + 1
	isFile
	isSymlink
	isHard
)

// An entry is one thing to make. After admit its name, and the link of a hard
// link, are clean: components joined by single slashes.
type entry struct {
	raw   string // the name as it stands in the archive
	name  string
	kind  kind
	size  int64
	mode  int64 // permission bits only
	mtime time.Time
	link  string // target of a symlink as it is, or the earlier name of a hard link
}

func (e *entry) refuse(format string, args ...any) error {
	return &RefusedError{Entry: e.raw, Why: fmt.Sprintf(format, args...)}
}

// A checker holds what must be remembered of the entries so far.
type checker struct {
	lim  Limits
	want string
	sum  Summary
	seed maphash.Seed
	seen map[uint64]kind // by hash of the clean name; a random seed keeps collisions to chance

	top    string // first name at the top
	nested bool   // top/want is a file
	spread bool   // there is more than one name at the top
}

func newChecker(want string, lim Limits) *checker {
	return &checker{lim: lim, want: want, seed: maphash.MakeSeed(), seen: make(map[uint64]kind)}
}

// admit checks e against the rules and the entries before it, and counts it. It
// reports false for an entry that is fine but makes nothing.
func (c *checker) admit(e *entry) (bool, error) {
	name, why := cleanName(e.raw)
	if why != "" {
		return false, &RefusedError{Entry: e.raw, Why: why, Hint: nameHint}
	}
	e.name = name
	if name == "" { // "./": the folder itself
		if e.kind != isDir {
			return false, e.refuse("name is the folder itself")
		}
		return false, nil
	}
	if err := c.count(e); err != nil {
		return false, err
	}
	if err := c.checkLink(e); err != nil {
		return false, err
	}
	if e.kind == isHard && e.link == e.name { // GNU tar writes this for a name given twice
		return false, nil
	}
	if err := c.place(e); err != nil {
		return false, err
	}
	c.watch(e)
	return true, nil
}

const nameHint = "go into the folder and send it from there: cd PROJECT && tar cf - . | ssh …"

// cleanName returns name without ".", doubled and trailing slashes, "" for the
// folder itself, or why it is refused.
func cleanName(name string) (clean, why string) {
	switch {
	case name == "":
		return "", "name is empty"
	case strings.IndexByte(name, 0) >= 0:
		return "", "name holds a NUL"
	case name[0] == '/':
		return "", "name is absolute"
	case len(name) > maxPath:
		return "", fmt.Sprintf("name is longer than %d bytes", maxPath)
	}
	parts := make([]string, 0, 16)
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
			continue
		case part == "..":
			return "", "name leaves the folder"
		case len(part) > maxComponent:
			return "", fmt.Sprintf("a part of the name is longer than %d bytes", maxComponent)
		}
		parts = append(parts, part)
	}
	if len(parts) > maxDepth {
		return "", fmt.Sprintf("name is more than %d folders deep", maxDepth)
	}
	return strings.Join(parts, "/"), ""
}

// count charges e to the limits, by its claim, before any of it is read.
func (c *checker) count(e *entry) error {
	limit := c.lim.Unpacked
	if limit <= 0 {
		limit = math.MaxInt64
	}
	if e.size > limit-c.sum.Bytes {
		return &RefusedError{Entry: e.raw, Why: "unpacks to more than " + Size(limit), TooBig: true}
	}
	c.sum.Bytes += e.size
	return c.another(e)
}

func (c *checker) another(e *entry) error {
	if c.lim.Entries > 0 && c.sum.Entries >= c.lim.Entries {
		return &RefusedError{Entry: e.raw, Why: fmt.Sprintf("more than %d files and folders", c.lim.Entries),
			Hint: "leave out what the job can make itself, and .git", TooBig: true}
	}
	c.sum.Entries++
	return nil
}

func (c *checker) checkLink(e *entry) error {
	switch e.kind {
	case isSymlink:
		if e.link == "" || len(e.link) > maxTarget || strings.IndexByte(e.link, 0) >= 0 {
			return e.refuse("is a link to no valid name")
		}
	case isHard:
		target, why := cleanName(e.link)
		if why != "" || target == "" {
			return e.refuse("is a hard link out of the folder, to %s", quote(e.link))
		}
		e.link = target
		if c.seen[maphash.String(c.seed, target)] != isFile {
			return e.refuse("is a hard link to %s, which is no earlier file of this archive", quote(target))
		}
	}
	return nil
}

// place records e and the folders above it, all of which must be folders.
func (c *checker) place(e *entry) error {
	var h maphash.Hash
	h.SetSeed(c.seed)
	for rest := e.name; ; {
		part, below, more := strings.Cut(rest, "/")
		h.WriteString(part)
		if !more {
			break
		}
		if err := c.folder(h.Sum64(), e); err != nil {
			return err
		}
		h.WriteByte('/')
		rest = below
	}
	id, k := h.Sum64(), e.kind
	if k == isHard {
		k = isFile
	}
	if c.seen[id] == isDir && k != isDir {
		return e.refuse("takes the place of a folder of this archive")
	}
	c.seen[id] = k
	return nil
}

// folder makes sure that the name hashed as id, above e, is a folder. A name seen
// for the first time is one that Unpack will have to make, so it counts.
func (c *checker) folder(id uint64, e *entry) error {
	switch c.seen[id] {
	case isDir:
		return nil
	case 0:
		c.seen[id] = isDir
		return c.another(e)
	case isSymlink:
		return e.refuse("lies below a link of this archive")
	}
	return e.refuse("lies below a file of this archive")
}

// watch looks out for the wanted file and for where it may be instead.
func (c *checker) watch(e *entry) {
	if c.want == "" {
		return
	}
	if e.name == c.want {
		c.sum.Found, c.sum.Linked, c.sum.Wanted = e.kind == isFile, e.kind == isSymlink || e.kind == isHard, nil
	}
	top, below, _ := strings.Cut(e.name, "/")
	if strings.HasPrefix(top, "._") || top == "__MACOSX" { // macOS adds these beside the folder
		return
	}
	if c.top == "" {
		c.top = top
	}
	c.spread = c.spread || top != c.top
	c.nested = c.nested || below == c.want && e.kind == isFile
}

func (c *checker) summary() Summary {
	if c.nested && !c.spread {
		c.sum.Nested = c.top
	}
	return c.sum
}

// Size writes n bytes for people: "10 GiB", "1.5 MiB".
func Size(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	return strconv.FormatFloat(math.Round(f*10)/10, 'f', -1, 64) + " " + units[u]
}

// quote makes a stranger's name fit for a terminal: escapes and control
// characters, bidirectional ones too, are written out; 200 bytes must do.
func quote(name string) string {
	if len(name) <= 200 {
		return strconv.Quote(name)
	}
	cut := 200
	for cut > 190 && !utf8.RuneStart(name[cut]) {
		cut--
	}
	return strconv.Quote(name[:cut]) + "…"
}

// refused reports whether err already says why an archive is not taken.
func refused(err error) bool {
	_, ok := errors.AsType[*RefusedError](err)
	return ok
}
