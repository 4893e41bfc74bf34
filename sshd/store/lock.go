package store

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Lock takes the folder dir for this process: until the returned Closer is closed,
// or the process is gone however it ended, another Lock of dir fails with an error
// that wraps ErrLocked and names the holder's process. The file DIR/lock stays; only
// the lock on it counts, so a file left behind by a crash is no obstacle.
//
// OpenSQLite takes it for itself. Call Lock only where no such store is opened.
func Lock(dir string) (io.Closer, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := flock(f); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s holds %s", ErrLocked, holder(f), path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if err := sign(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

// A process that was killed while it started another keeps its locks until that one has
// begun. Its number in the file tells that it is gone, and that the lock soon will be.
const (
	goneTries = 100
	gonePause = 10 * time.Millisecond
)

func flock(f *os.File) error {
	for n := 0; ; n++ {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || n == goneTries || alive(f) {
			return err
		}
		time.Sleep(gonePause)
	}
}

// alive reports whether the process that signed is there.
func alive(f *os.File) bool {
	pid, ok := signer(f)
	return ok && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// sign writes who holds the lock into its file. It cuts only afterwards, so that a
// reader never finds the file empty.
func sign(f *os.File) error {
	pid := strconv.Itoa(os.Getpid()) + "\n"
	if _, err := f.WriteAt([]byte(pid), 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(pid)))
}

// signer reads what sign wrote. The holder may be about to write it.
func signer(f *os.File) (pid int, ok bool) {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	line, _, _ := strings.Cut(string(b[:n]), "\n")
	pid, err := strconv.Atoi(line)
	return pid, err == nil && pid > 0
}

func holder(f *os.File) string {
	if pid, ok := signer(f); ok {
		return fmt.Sprintf("process %d", pid)
	}
	return "another process"
}
