package stream

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// List returns the ids of all jobs that have a folder, in no order. What comes or goes
// meanwhile may be among them or not. It ends with the first error.
func (s *Spools) List() iter.Seq2[int64, error] {
	return func(yield func(int64, error) bool) {
		dir, err := os.Open(s.dir)
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if err != nil {
			yield(0, fmt.Errorf("list output: %w", err))
			return
		}
		defer dir.Close()
		for {
			names, err := dir.Readdirnames(1000)
			for _, name := range names {
				id, err := strconv.ParseInt(name, 10, 64)
				if err == nil && !yield(id, nil) {
					return
				}
			}
			if err == io.EOF {
				return
			}
			if err != nil {
				yield(0, fmt.Errorf("list output: %w", err))
				return
			}
		}
	}
}

// Usage returns how many bytes of the disk the output of a job takes, folders
// included; none is 0.
func (s *Spools) Usage(id int64) (int64, error) {
	n, err := usage(filepath.Join(s.dir, strconv.FormatInt(id, 10)))
	if err != nil {
		return 0, fmt.Errorf("usage of the output of job %d: %w", id, err)
	}
	return n, nil
}

// usage is du(1) without all that is not ours: attempts are folders of files.
func usage(path string) (int64, error) {
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case errors.Is(err, fs.ErrNotExist): // gone meanwhile
		return 0, nil
	case err != nil:
		return 0, err
	}
	n := st.Blocks * 512
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return n, nil
	}
	dir, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		more, err := usage(filepath.Join(path, name))
		if err != nil {
			return 0, err
		}
		n += more
	}
	return n, nil
}
