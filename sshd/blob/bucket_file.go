package blob

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/minio/minio-go/v7"
)

// skipMost is how far a reader reads on to a place instead of asking for it anew.
const skipMost = 256 << 10

// An object is a source in a bucket: one request whose answer is read on and on, and
// another when somebody wants to read elsewhere, or the connection breaks.
type object struct {
	ctx  context.Context // of Open, as Store says
	b    *Bucket
	name string
	size int64

	pos  int64         // of Read and Seek
	body io.ReadCloser // nil, or
	at   int64         // stands here
	news bool          // it has given something
}

// request asks for the object from an offset on.
func (o *object) request(from int64) error {
	o.drop()
	opt := minio.GetObjectOptions{}
	if from > 0 {
		if err := opt.SetRange(from, 0); err != nil {
			return err
		}
	}
	body, info, header, err := minio.Core{Client: o.b.client}.GetObject(o.ctx, o.b.at.bucket, o.name, opt)
	if err != nil {
		return o.b.classify(o.ctx, "read", err)
	}
	if from == 0 {
		o.size = info.Size
	} else if header.Get("Content-Range") == "" { // it does not know ranges, and sends all
		body.Close()
		return fmt.Errorf("%w: it answers without the range that was asked for", ErrUnavailable)
	}
	o.body, o.at, o.news = body, from, false
	return nil
}

func (o *object) drop() {
	if o.body != nil {
		o.body.Close()
		o.body = nil
	}
}

// move makes body stand at off, which is in the object.
func (o *object) move(off int64) error {
	if ahead := off - o.at; o.body != nil && ahead >= 0 && ahead <= skipMost {
		n, err := io.CopyN(io.Discard, o.body, ahead)
		o.at += n
		if err == nil {
			return nil
		}
	}
	return o.request(off)
}

// some reads at least one byte at off, and at most p. A connection that breaks after it
// has brought something is made anew.
func (o *object) some(p []byte, off int64) (int, error) {
	if off >= o.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), o.size-off)]
	for len(p) > 0 {
		if err := o.move(off); err != nil {
			return 0, err
		}
		n, err := o.body.Read(p)
		o.at += int64(n)
		if n > 0 {
			o.news = true
			return n, nil
		}
		if err == nil {
			continue
		}
		again := o.news && o.ctx.Err() == nil
		o.drop()
		if !again {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, o.b.classify(o.ctx, "read", err)
		}
	}
	return 0, nil
}

func (o *object) Read(p []byte) (int, error) {
	n, err := o.some(p, o.pos)
	o.pos += int64(n)
	return n, err
}

func (o *object) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("blob: a negative offset")
	}
	for n < len(p) && err == nil {
		var m int
		m, err = o.some(p[n:], off+int64(n))
		n += m
	}
	return n, err
}

func (o *object) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += o.pos
	case io.SeekEnd:
		offset += o.size
	}
	if offset < 0 {
		return 0, errors.New("blob: a negative offset")
	}
	o.pos = offset
	return offset, nil
}

func (o *object) Close() error {
	o.drop()
	return nil
}
