//go:build !amd64

package seccomp

import "golang.org/x/sys/unix"

// archForbidden are calls that only some machines have: here none.
var archForbidden []uint32

// inotify is the call that makes an instance.
var inotify = []uint32{unix.SYS_INOTIFY_INIT1}
