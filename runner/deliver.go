package runner

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/runner/job"
)

// wireRoom is how much of an archive or a source travels in one frame.
const wireRoom = 256 << 10

// deliver sends an attempt to raid while it runs and until raid has committed its
// result. It returns nil then, errStale when raid does not want it, or why ctx ended.
func (r *Runner) deliver(ctx context.Context, a *attempt) error {
	wait := retryMin
	for {
		client, err := r.connection(ctx)
		if err != nil {
			return err
		}
		began := time.Now()
		err = a.send(ctx, client, r.Local)
		switch {
		case err == nil, errors.Is(err, errStale):
			a.cancel(errStale) // a box that still runs has nobody to report to
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		select {
		case <-a.over:
			if a.result == nil {
				return errStale // nothing will ever come
			}
		default:
		}
		r.Logf("job %d: sending stopped: %v", a.offer.Job, err)
		if time.Since(began) > retryMax {
			wait = retryMin // it worked for a while: this is another trouble
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		wait = min(2*wait, retryMax)
	}
}

// send opens one session and sends what raid has not, from the byte it names. A local
// runner offers to share the log's files instead.
func (a *attempt) send(ctx context.Context, client *dial.Client, local bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	command := fmt.Sprintf("runner attempt %d %d", a.offer.Job, a.offer.Fence)
	if local {
		command += " share"
	}
	s, err := client.Start(ctx, command, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	lines := bufio.NewReader(s.Stdout)
	have, shared, err := readHave(lines)
	if err != nil {
		return err
	}
	answer := make(chan error, 1)
	go func() { // ends with the session, which Close ends
		err := readAnswer(lines)
		cancel(err)
		answer <- err
	}()
	defer func() { s.Close(); <-answer }()
	sendLog := a.sendLog
	if shared {
		sendLog = a.ring
	}
	if err := a.sendFrom(ctx, s.Stdin, have, sendLog); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}
	err = <-answer
	answer <- err
	if errors.Is(err, errDone) {
		return nil
	}
	return err
}

// errDone is raid's word that the result is committed.
var errDone = errors.New("done")

// readHave reads raid's first line: what it has, and whether it shares our files.
func readHave(lines *bufio.Reader) (have int64, shared bool, err error) {
	line, err := lines.ReadString('\n')
	if err != nil {
		return 0, false, fmt.Errorf("raid answered %q: %w", line, err)
	}
	if line == "stale\n" {
		return 0, false, errStale
	}
	word, number, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	have, err = strconv.ParseInt(number, 10, 64)
	if err != nil || have < 0 || word != "have" && word != "share" {
		return 0, false, fmt.Errorf("raid answered %q", line)
	}
	return have, word == "share", nil
}

// readAnswer reads acknowledgements until raid says how it ends.
func readAnswer(lines *bufio.Reader) error {
	for {
		line, err := lines.ReadString('\n')
		switch {
		case err != nil:
			return errCut
		case line == "done\n":
			return errDone
		case line == "stale\n":
			return errStale
		}
	}
}

// sendFrom sends the log from byte have, then what have leaves of the archive, then
// the result. have counts the bytes of the log and after them those of the archive.
func (a *attempt) sendFrom(ctx context.Context, w io.Writer, have int64, sendLog logSender) error {
	begun, err := sendLog(ctx, w, min(have, a.log.Size()))
	if err != nil {
		return err
	}
	select {
	case <-a.over:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if a.result == nil {
		return errStale
	}
	if !begun && a.begun.Load() {
		if err := job.WriteFrame(w, job.Begun, nil); err != nil {
			return err
		}
	}
	if err := job.WriteFrame(w, job.Sealed, nil); err != nil {
		return err
	}
	if err := a.sendArchive(w, max(0, have-a.log.Size())); err != nil {
		return err
	}
	res, err := json.Marshal(a.result)
	if err != nil {
		return err
	}
	return job.WriteFrame(w, job.Final, res)
}

// A logSender brings the log to raid from an offset until it is sealed, and says
// whether it has sent job.Begun.
type logSender func(ctx context.Context, w io.Writer, from int64) (begun bool, err error)

// A bell in bulk rings once for all that came within ringEvery.
const (
	ringBulk  = 32 << 10
	ringEvery = 2 * time.Millisecond
)

// ring tells a raid that shares the log's files how long it is.
func (a *attempt) ring(ctx context.Context, w io.Writer, from int64) (begun bool, err error) {
	for {
		size, err := a.log.Await(ctx, from)
		if !begun && a.begun.Load() {
			begun = true
			if err := job.WriteFrame(w, job.Begun, nil); err != nil {
				return begun, err
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrClosed) {
			return begun, nil
		}
		if err != nil {
			return begun, err
		}
		if err := job.WriteFrame(w, job.Grown, binary.BigEndian.AppendUint64(nil, uint64(size))); err != nil {
			return begun, err
		}
		if size-from >= ringBulk {
			select {
			case <-time.After(ringEvery):
			case <-ctx.Done():
				return begun, context.Cause(ctx)
			}
		}
		from = size
	}
}

// sendLog sends the log as it grows, until it is sealed. The news that the first
// step has started goes before whatever the step said.
func (a *attempt) sendLog(ctx context.Context, w io.Writer, from int64) (begun bool, err error) {
	rd := a.log.Reader(from)
	defer rd.Close()
	buf := make([]byte, job.HeaderLen+job.MaxFrame) // any frame fits
	for {
		n, err := rd.ReadRaw(ctx, buf)
		if !begun && a.begun.Load() {
			begun = true
			if err := job.WriteFrame(w, job.Begun, nil); err != nil {
				return begun, err
			}
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return begun, err
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrClosed) { // closed: a full disk, see conclude
			return begun, nil
		}
		if err != nil {
			return begun, err
		}
	}
}

func (a *attempt) sendArchive(w io.Writer, from int64) error {
	f, err := os.Open(a.archivePath())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return err
	}
	buf := make([]byte, job.HeaderLen+wireRoom)
	for {
		n, err := io.ReadFull(f, buf[job.HeaderLen:])
		if n > 0 {
			job.PutHeader(buf, job.File, n)
			if _, err := w.Write(buf[:job.HeaderLen+n]); err != nil {
				return err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sendSource fetches the checked tar of a job and writes it into a box as frames. A
// connection that breaks, or a raid that is about to stop, costs no attempt: raid makes
// the same tar again, and what the box has of it is left out.
func (r *Runner) sendSource(ctx context.Context, l job.Lease, w io.Writer) error {
	f := &fetch{box: w, sum: sha256.New()}
	for wait := retryMin; ; wait = min(2*wait, retryMax) {
		client, err := r.connection(ctx)
		if err != nil {
			return err
		}
		err = f.once(ctx, client, l)
		if err == nil {
			return job.WriteFrame(w, job.File, nil)
		}
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if !passes(err) {
			return fmt.Errorf("fetch the source: %w", err)
		}
		r.Logf("job %d: fetch the source: %v", l.Job, err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// errLater is raid's word that it cannot do something just now.
var errLater = errors.New("raid cannot do it at the moment")

// passes reports whether an error says nothing about the source: the connection was
// lost, or raid, which may be stopping, opened no session or said to try later.
func passes(err error) bool {
	var refused *ssh.OpenChannelError
	return errors.Is(err, dial.ErrLost) || errors.Is(err, errLater) || errors.As(err, &refused)
}

// A fetch is a source on its way into a box.
type fetch struct {
	box  io.Writer
	sent int64     // bytes of the tar that the box has
	sum  hash.Hash // of them
}

// once opens one session and sends what the box has not.
func (f *fetch) once(ctx context.Context, client *dial.Client, l job.Lease) error {
	s, err := client.Start(ctx, fmt.Sprintf("runner source %d %d", l.Job, l.Fence), nil)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := f.skip(s); err != nil {
		return err
	}
	buf := make([]byte, job.HeaderLen+wireRoom)
	for {
		n, err := s.Stdout.Read(buf[job.HeaderLen:])
		if n > 0 {
			job.PutHeader(buf, job.File, n)
			if _, err := f.box.Write(buf[:job.HeaderLen+n]); err != nil {
				return fmt.Errorf("unpack: %w", err)
			}
			f.sent += int64(n)
			f.sum.Write(buf[job.HeaderLen : job.HeaderLen+n])
		}
		if err != nil {
			return ended(s)
		}
	}
}

// skip reads over what the box has, which must be the same bytes again.
func (f *fetch) skip(s *dial.Session) error {
	again := sha256.New()
	if _, err := io.CopyN(again, s.Stdout, f.sent); err != nil {
		return cmp.Or(ended(s), io.ErrUnexpectedEOF)
	}
	if !bytes.Equal(again.Sum(nil), f.sum.Sum(nil)) {
		return errors.New("it has changed")
	}
	return nil
}

// ended says why a session has no more to read, nil when all was well.
func ended(s *dial.Session) error {
	exit, err := s.Wait()
	switch {
	case err != nil || exit == 0:
		return err
	case exit == job.ExitTryLater:
		return errLater
	}
	return fmt.Errorf("raid refused with status %d", exit)
}
