package blob

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// block is what one read and one write move: aligned whatever the reader gives.
	block = 256 << 10
	// ahead is how many bytes may be written before the disk is told to begin with
	// them, so that the sync in Commit finds little left to do.
	ahead = 8 << 20
	// claim is how much room a large upload asks of the file system at a time. Writing
	// into room that is there takes half the system time of finding it block by block.
	claim = 32 << 20
)

// An Upload is a blob on its way. Use it from one goroutine; ReadAt may run
// concurrently with everything and sees what was written before it began.
type Upload struct {
	disk  *disk
	home  home
	file  *os.File
	hash  hash.Hash
	limit int64
	size  int64
	begun int64 // bytes whose way to the disk has begun
	room  int64 // bytes the file has room for, when it was asked for
	err   error // the first failure; nothing works after it
	key   Key   // once committed
	over  bool  // the file is closed, and committed or removed
}

// A home is where an upload becomes a blob: the half of a Store that Upload uses.
type home interface {
	// place makes the blob k of file, which has size bytes of that hash, is whole and
	// nobody's but ours. It goes away from where it is, or is left there on an error.
	place(ctx context.Context, file *os.File, k Key, size int64) error
}

// create begins an upload that becomes a blob of h's.
func (d *disk) create(h home, limit int64) (*Upload, error) {
	if err := d.room(); err != nil {
		return nil, err
	}
	file, err := os.CreateTemp(d.tmp(), tempPrefix) // 0600
	if err != nil {
		return nil, describe("upload", err)
	}
	return &Upload{disk: d, home: h, file: file, hash: sha256.New(), limit: limit}, nil
}

// Write appends p. It writes all of it or fails for good: with ErrTooBig, ErrNoSpace,
// or as the disk did.
func (u *Upload) Write(p []byte) (int, error) {
	if u.err != nil {
		return 0, u.err
	}
	if u.over {
		return 0, ErrDone
	}
	if u.limit > 0 && u.size+int64(len(p)) > u.limit {
		return 0, u.fail(fmt.Errorf("%w: more than %d bytes", ErrTooBig, u.limit))
	}
	if _, err := u.file.Write(p); err != nil {
		return 0, u.fail(describe("upload", err))
	}
	u.hash.Write(p)
	u.size += int64(len(p))
	if u.size-u.begun >= ahead {
		if err := u.push(); err != nil {
			return 0, u.fail(err)
		}
	}
	return len(p), nil
}

// push has the disk begin with what was written since the last time, and looks
// whether others, or we, have reached the reserve meanwhile.
func (u *Upload) push() error {
	if !u.disk.passing {
		if err := writeBack(u.file, u.begun, u.size-u.begun); err != nil {
			return describe("upload", err)
		}
	}
	u.begun = u.size
	if err := u.disk.room(); err != nil {
		return err
	}
	if u.size+ahead > u.room {
		from := max(u.room, u.size)
		u.room = from + claim
		allocate(u.file, from, claim)
	}
	return nil
}

// ReadFrom appends all that r gives, in whole blocks. io.Copy uses it.
func (u *Upload) ReadFrom(r io.Reader) (int64, error) {
	start, buf := u.size, make([]byte, block)
	for {
		n, err := fill(r, buf)
		if n > 0 {
			if _, err := u.Write(buf[:n]); err != nil {
				return u.size - start, err
			}
		}
		if err == io.EOF {
			return u.size - start, nil
		}
		if err != nil {
			return u.size - start, err
		}
	}
}

// fill reads until buf is full or r fails. It is not io.ReadFull, which lets nobody
// tell the end of r from r's own io.ErrUnexpectedEOF: half an upload, not a short one.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var m int
		m, err = r.Read(buf[n:])
		n += m
	}
	return n, err
}

// ReadAt reads back what was written, until Commit or Abort.
func (u *Upload) ReadAt(p []byte, off int64) (int, error) { return u.file.ReadAt(p, off) }

// Size returns how many bytes were written.
func (u *Upload) Size() int64 { return u.size }

// Commit makes the upload a blob and returns its key. When it returns, the blob is
// durable. It ends the upload whatever it returns; called again, it returns the same.
func (u *Upload) Commit(ctx context.Context) (Key, error) {
	if u.key != "" {
		return u.key, nil
	}
	if u.err == nil {
		key := keyOf(u.hash.Sum(nil))
		if u.err = describe(key, u.place(ctx, key)); u.err == nil {
			u.key = key
		}
	}
	return u.key, errors.Join(u.err, u.end())
}

func (u *Upload) place(ctx context.Context, k Key) error {
	if u.room > u.size {
		if err := u.file.Truncate(u.size); err != nil { // gives back what was not needed
			return err
		}
	}
	return u.home.place(ctx, u.file, k, u.size)
}

// Abort ends the upload and leaves nothing of it. After Commit, or another Abort, it
// does nothing.
func (u *Upload) Abort() error {
	if u.err == nil {
		u.err = ErrDone
	}
	return u.end()
}

// end closes the file, once, and removes it unless it is a blob now. A file that was
// synced has nothing left that could fail in its Close, and the others do not matter.
func (u *Upload) end() error {
	if u.over {
		return nil
	}
	u.over = true
	u.file.Close()
	if u.key != "" {
		return nil
	}
	return os.Remove(u.file.Name())
}

// fail keeps the first error for good.
func (u *Upload) fail(err error) error {
	u.err = err
	return err
}

// adopt is Store.Adopt for any home.
func adopt(ctx context.Context, h home, path string, limit int64) (Key, int64, error) {
	key, size, err := tryAdopt(ctx, h, path, limit)
	if err != nil {
		return "", 0, fmt.Errorf("adopt %s: %w", path, err)
	}
	return key, size, nil
}

func tryAdopt(ctx context.Context, h home, path string, limit int64) (Key, int64, error) {
	// Neither follow a link nor wait for the other end of a FIFO.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", 0, err
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return "", 0, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1:
		return "", 0, errors.New("not a regular file of one name")
	case limit > 0 && st.Size > limit:
		return "", 0, fmt.Errorf("%w: %d bytes, more than %d", ErrTooBig, st.Size, limit)
	}
	hash := sha256.New()
	n, err := io.CopyBuffer(hash, onlyReader{file}, make([]byte, block))
	if err != nil {
		return "", 0, err
	}
	if n != st.Size {
		return "", 0, fmt.Errorf("%d bytes became %d while they were read", st.Size, n)
	}
	key := keyOf(hash.Sum(nil))
	return key, n, describe(key, h.place(ctx, file, key, n))
}
