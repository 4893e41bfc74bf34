// Package blob keeps uploads and outputs, each named by the SHA-256 of its bytes: as
// files in one folder, a [Folder], or as objects on S3, a [Bucket].
//
//	u, err := store.Create(limit)
//	defer u.Abort()            // nothing once it is committed
//	_, err = io.Copy(u, r)     // hashed as it passes
//	key, err := u.Commit(ctx)  // durable now
//	f, err := store.Open(ctx, key)
//
// It promises: a key that Commit or Adopt returned names the same bytes until it is
// removed, after a power cut too; there is never half a blob under its final name; what
// was not committed leaves nothing, at the latest when the store is opened again; whoever
// reads a blob from its start to its end is told if the bytes are not those of its key;
// and the disk is not filled: writing stops at a reserve. Non-goals: who may read what,
// how long a blob lives (its caller counts references, and asks with RemoveBefore and
// Renew), and two processes in one folder: hold a lock around it. A bucket may have many
// readers.
//
// On disk: sha256/ab/cdef… are blobs, 0400; tmp/ holds what is on its way, to a bucket
// as well.
package blob

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"strings"
	"time"
)

var (
	// ErrNotFound: there is no such blob. It is fs.ErrNotExist, too.
	ErrNotFound = fmt.Errorf("blob: not found: %w", fs.ErrNotExist)
	// ErrNoSpace: the disk is full up to the reserve. It may work later.
	ErrNoSpace = errors.New("blob: no space left")
	// ErrTooBig: more bytes than the limit.
	ErrTooBig = errors.New("blob: too big")
	// ErrCorrupt: a blob's bytes are not those of its key.
	ErrCorrupt = errors.New("blob: corrupt")
	// ErrDone: the upload was committed or aborted before.
	ErrDone = errors.New("blob: upload is over")
	// ErrUnavailable: the store cannot be reached, or not now. It may work later.
	ErrUnavailable = errors.New("blob: store is unavailable")
	// ErrDenied: the store does not let us. It works once somebody has changed that.
	ErrDenied = errors.New("blob: access denied")
)

// A Store keeps blobs. Both kinds promise what the package does; package blobtest says
// it in code. All methods are safe for concurrent use. Those with a context may wait for
// a network and return the context's cause.
type Store interface {
	// Create begins an upload of at most limit bytes; 0 is no limit. The caller ends it
	// with Commit or Abort. ErrNoSpace: the disk is full up to the reserve.
	Create(limit int64) (*Upload, error)
	// Adopt makes a blob of the file at path, which goes away from there, and returns its
	// key and size. It does not mind the reserve. The file must lie in a place where nobody
	// else can write and be open to no writer: its bytes are read once and believed. When
	// Adopt fails the file stays. ErrTooBig: it has more than limit bytes; 0 is no limit.
	Adopt(ctx context.Context, path string, limit int64) (Key, int64, error)
	// Open opens a blob for reading, or returns ErrNotFound. The caller closes it. ctx
	// counts for all reading, too.
	Open(ctx context.Context, k Key) (File, error)
	// Stat describes a blob, or returns ErrNotFound.
	Stat(ctx context.Context, k Key) (Info, error)
	// Verify reads a blob and returns ErrCorrupt if it is not what was committed.
	Verify(ctx context.Context, k Key) error
	// Remove removes a blob. One that is not there is no error.
	Remove(ctx context.Context, k Key) error
	// RemoveBefore removes a blob unless it was committed at t or later, and tells whether
	// it did. Whoever removes by age uses it: the same bytes may just have been committed
	// once more, by someone whose reference to them cannot be seen yet.
	RemoveBefore(ctx context.Context, k Key, t time.Time) (bool, error)
	// Renew makes a blob as young as if it had been committed now, or returns ErrNotFound.
	// Whoever is about to refer to an old one uses it, to keep it from RemoveBefore.
	Renew(ctx context.Context, k Key) error
	// List returns all blobs in the order of their keys. What comes or goes meanwhile may
	// be in it or not. It ends with the first error. A Time in it may be too early, as it
	// may not show what Renew did; Stat's does.
	List(ctx context.Context) iter.Seq2[Info, error]
	// Tidy removes what uploads left behind that will never end. Whoever removes by age
	// calls it first: its error says that this is not to be done now.
	Tidy(ctx context.Context) error
	// Link returns a URL that gives a blob to whoever has it, until expiry, as a file
	// called name. ErrNoLinks: this store has none of its own.
	Link(ctx context.Context, k Key, name string, expiry time.Time) (string, error)
	// Shared reports whether the blobs lie elsewhere, where they outlive this machine.
	// Then they take no room of the disk that Free is about.
	Shared() bool
	// Free returns how many bytes an unprivileged user can still write on the disk that
	// uploads pass through, and how many it has.
	Free() (free, total int64, err error)
	// Reserve returns how many bytes uploads leave free on a disk of total bytes.
	Reserve(total int64) int64
}

// ErrNoLinks: the store cannot hand out links. It never changes.
var ErrNoLinks = errors.New("blob: no links to files in a folder")

// A File is a blob that is being read, by one goroutine. What was opened stays whole
// though the blob be removed meanwhile, or says that it is gone.
type File interface {
	// Read and ReadAt return ErrCorrupt instead of the last bytes if what they have read
	// from the start on is all there is, and not what was committed.
	io.Reader
	io.ReaderAt
	io.Seeker
	io.Closer
}

const keyPrefix = "sha256:"

// A Key names a blob: "sha256:" and 64 lower-case hex digits.
type Key string

// ParseKey returns s as a Key if it is one.
func ParseKey(s string) (Key, error) {
	digits, ok := strings.CutPrefix(s, keyPrefix)
	sum, err := hex.DecodeString(digits)
	if !ok || err != nil || len(sum) != sha256.Size || digits != strings.ToLower(digits) {
		return "", fmt.Errorf("blob: %.80q is no key", s)
	}
	return Key(s), nil
}

// Hex returns the digits alone, as sha256sum(1) prints them.
func (k Key) Hex() string { return strings.TrimPrefix(string(k), keyPrefix) }

func keyOf(sum []byte) Key { return Key(keyPrefix + hex.EncodeToString(sum)) }

// An Info describes a blob.
type Info struct {
	Key  Key
	Size int64
	Time time.Time // when it was last committed
}
