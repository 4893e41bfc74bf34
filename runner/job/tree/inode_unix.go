//go:build unix

package tree

import (
	"io/fs"
	"syscall"
)

// identify reports whether the file has several names, and which file it is.
func identify(fi fs.FileInfo) (id fileID, several bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Nlink < 2 {
		return fileID{}, false
	}
	return fileID{uint64(st.Dev), uint64(st.Ino)}, true
}
