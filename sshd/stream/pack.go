package stream

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/klauspost/compress/zstd"

	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/runner/job/spool"
)

// A pack is all output of one job in one file, for a raid that has not got its spool: a
// zstd stream of frames. Each attempt begins with a Begun frame of 8 bytes, big endian,
// which attempt that is, and after it comes its log, frame by frame, what is missing as
// Gap. A Final frame ends the pack, so that half of one is not taken for the whole.

// packWindow is how far zstd looks back, and so what packing takes of memory.
const packWindow = 1 << 20

// ErrPack is returned by Restore for what Pack has not written.
var ErrPack = errors.New("stream: not the packed output of a job")

// Size returns how many bytes the logs of a job have together, dropped ones included: the
// last Chunk's End.
func (s *Spools) Size(id int64) (int64, error) {
	f, err := s.use(id)
	if err != nil {
		return 0, err
	}
	defer s.unuse(id, f)
	n, _ := f.size()
	return n, nil
}

// Pack writes all output of a job to w, compressed, and returns its Size. The last
// attempt must be sealed.
func (s *Spools) Pack(ctx context.Context, id int64, w io.Writer) (int64, error) {
	f, err := s.use(id)
	if err != nil {
		return 0, err
	}
	defer s.unuse(id, f)
	n, err := f.pack(ctx, w)
	if err != nil {
		return 0, fmt.Errorf("pack output of job %d: %w", id, err)
	}
	return n, nil
}

func (f *feed) pack(ctx context.Context, w io.Writer) (n int64, err error) {
	f.mu.Lock()
	logs := f.logs
	f.mu.Unlock()
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(packWindow), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return 0, err
	}
	defer z.Close() // once more is no harm
	for _, a := range logs {
		if err := job.WriteFrame(z, job.Begun, binary.BigEndian.AppendUint64(nil, uint64(a.n))); err != nil {
			return 0, err
		}
		if err := copyLog(ctx, z, a.log); err != nil {
			return 0, err
		}
		n += a.log.Size()
	}
	return n, errors.Join(job.WriteFrame(z, job.Final, nil), z.Close())
}

// copyLog writes the frames of a log that is complete.
func copyLog(ctx context.Context, w io.Writer, l *spool.Log) error {
	r, stop := l.Reader(0), ended()
	defer r.Close()
	buf := make([]byte, job.HeaderLen+job.MaxFrame)
	for ctx.Err() == nil {
		n, err := r.ReadRaw(stop, buf)
		if err == io.EOF {
			return nil
		}
		if err != nil { // where it would wait there is no end yet
			return err
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// Restore puts what Pack wrote in the place of all output of a job, which is finished
// then. Whoever follows what was there is cut off. An error leaves that as it was; what
// does not come of Pack is ErrPack.
func (s *Spools) Restore(id int64, r io.Reader) error {
	if err := s.restore(id, r); err != nil {
		return fmt.Errorf("restore output of job %d: %w", id, err)
	}
	return nil
}

func (s *Spools) restore(id int64, r io.Reader) (err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(s.dir, restoring)
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // what is left of it
	from := &source{r: r}
	if err := unpack(tmp, from); err != nil {
		return cmp.Or(from.err, err) // not that the pack is bad, but that it cannot be read
	}
	if err := os.WriteFile(filepath.Join(tmp, doneName), nil, 0o600); err != nil {
		return err
	}
	return s.replace(id, func(dir string) error { return os.Rename(tmp, dir) })
}

// A source remembers why it could not be read.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// restoring begins the names of folders that are on their way. They are no numbers.
const restoring = "restoring-"

// sweep removes what a process that is gone was restoring.
func (s *Spools) sweep() error {
	old, err := filepath.Glob(filepath.Join(s.dir, restoring+"*"))
	for _, dir := range old {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// unpack makes the logs of a pack in dir.
func unpack(dir string, r io.Reader) error {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(packWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer z.Close()
	var l *spool.Log
	defer func() {
		if l != nil {
			l.Close()
		}
	}()
	last := int64(-1)
	for in := job.NewSplitter(z); ; {
		run, err := in.Next()
		switch {
		case err == io.EOF:
			return fmt.Errorf("%w: %w", ErrPack, io.ErrUnexpectedEOF)
		case err != nil:
			return fmt.Errorf("%w: %w", ErrPack, err)
		case run.Log != nil && l != nil:
			if err := l.Append(run.Log); err != nil {
				return err
			}
		case run.Kind == job.Final && len(run.Payload) == 0:
			return errors.Join(sealed(l), drain(z))
		case run.Kind == job.Begun && len(run.Payload) == 8:
			n := int64(binary.BigEndian.Uint64(run.Payload))
			if n <= last || n > 1<<20 {
				return fmt.Errorf("%w: attempt %d after %d", ErrPack, n, last)
			}
			if err := sealed(l); err != nil {
				return err
			}
			if l, err = spool.Open(filepath.Join(dir, strconv.FormatInt(n, 10)), spool.Options{}); err != nil {
				return err
			}
			last = n
		default:
			return fmt.Errorf("%w: a frame of kind %q", ErrPack, byte(run.Kind))
		}
	}
}

// drain reads what comes after the last frame, which is nothing but the checksum.
func drain(r io.Reader) error {
	switch n, err := io.Copy(io.Discard, r); {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrPack, err)
	case n > 0:
		return fmt.Errorf("%w: %d bytes after its end", ErrPack, n)
	}
	return nil
}

func sealed(l *spool.Log) error {
	if l == nil {
		return nil
	}
	return errors.Join(l.Seal(), l.Close())
}

// replace calls put while the folder of a job is not there.
func (s *Spools) replace(id int64, put func(dir string) error) error {
	if err := s.Remove(id); err != nil {
		return err
	}
	f, err := s.hold(id)
	if err != nil {
		return err
	}
	defer s.unuse(id, f)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := closeAll(f.logs); err != nil { // somebody was quicker, and found nothing
		return err
	}
	f.logs, f.loaded = nil, false
	err = os.RemoveAll(f.dir)
	if err == nil {
		err = put(f.dir)
	}
	f.ringLocked()
	return errors.Join(err, f.loadLocked())
}
