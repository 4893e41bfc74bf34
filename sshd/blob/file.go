package blob

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
)

// A checked is a File that tells of bytes that are not those of its key.
type checked struct {
	source
	key    Key
	size   int64 // of the source, whatever that holds
	hash   hash.Hash
	hashed int64 // bytes from the start that hash has seen
	pos    int64
	bad    error // ErrCorrupt, once it is known

	corrupt func() // nil, or told
}

// A source is where a checked reads from.
type source interface {
	io.Reader
	io.ReaderAt
	io.Seeker
	io.Closer
}

func check(k Key, s source, size int64) *checked {
	return &checked{source: s, key: k, size: size, hash: sha256.New()}
}

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.source.Read(p)
	if c.see(p[:n], c.pos); c.bad != nil {
		return 0, c.bad
	}
	c.pos += int64(n)
	return n, err
}

// ReadAt counts, too: some who have to go back read from the start to the end that way.
func (c *checked) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.source.ReadAt(p, off)
	if c.see(p[:n], off); c.bad != nil {
		return 0, c.bad
	}
	return n, err
}

// see adds to the hash what of p, which is at off, comes next. With the last byte it is
// known what the blob is worth, before that is handed out: who reads as much as there is
// to be never asks for the end.
func (c *checked) see(p []byte, off int64) {
	if from := c.hashed - off; from >= 0 && from < int64(len(p)) {
		c.hash.Write(p[from:])
		c.hashed = off + int64(len(p))
	} else if c.size > 0 {
		return
	}
	if c.hashed < c.size || c.bad != nil {
		return
	}
	if got := keyOf(c.hash.Sum(nil)); got != c.key {
		if c.corrupt != nil {
			c.corrupt()
		}
		c.bad = fmt.Errorf("%w: %s has the bytes of %s", ErrCorrupt, c.key, got)
	}
}

func (c *checked) Seek(offset int64, whence int) (int64, error) {
	pos, err := c.source.Seek(offset, whence)
	if err == nil {
		c.pos = pos
	}
	return pos, err
}

// verify reads all of a blob.
func verify(ctx context.Context, s Store, k Key) error {
	file, err := s.Open(ctx, k)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{file}, make([]byte, block))
	return err
}

// onlyReader and onlyWriter hide the rest: io.Copy would find ways around its buffer.
type onlyReader struct{ io.Reader }

type onlyWriter struct{ io.Writer }
